// The CUDA device of the ops: the launchers of launch.h on torch's current stream.
//
// Only c10's CUDA headers are included: ATen's want library headers that a toolkit of nvcc alone does not have.
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <string>

#include "../launch.h"
#include "check.h"
#include "check_launch.h"
#include "device.h"
#include "ops.h"

namespace qlora {
namespace {

using at::Tensor;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

std::string describe(const Packed4bit& w) {
  return std::string(w.quant_type == QuantType::NF4 ? "nf4" : "fp4") + ", blocksize " + std::to_string(w.blocksize) +
         (w.nested_absmax != nullptr ? ", double quantization" : "");
}

class Cuda final : public Device {
 public:
  void quantize_4bit(const Tensor& weight, QuantType quant_type, int64_t blocksize, const Tensor& packed,
                     const Tensor& absmax) const override {
    const c10::cuda::CUDAGuard guard(weight.device());
    check_launch(
        cuda::launch_quantize_4bit(weight.const_data_ptr(), dtype_of(weight.scalar_type()), weight.numel(), blocksize,
                                   quant_type, packed.data_ptr<uint8_t>(), absmax.data_ptr<float>(), stream()),
        "quantize_4bit", c10::str(weight.sizes(), " ", weight.scalar_type(), ", blocksize ", blocksize));
  }

  void quantize_absmax(const Tensor& absmax, const Tensor& codes, const Tensor& nested_absmax,
                       const Tensor& nested_offset) const override {
    const c10::cuda::CUDAGuard guard(absmax.device());
    const Tensor group_sums = at::empty(nested_absmax.sizes(), absmax.options().dtype(at::kDouble));
    check_launch(
        cuda::launch_quantize_absmax(absmax.const_data_ptr<float>(), absmax.numel(), group_sums.data_ptr<double>(),
                                     codes.data_ptr<uint8_t>(), nested_absmax.data_ptr<float>(),
                                     nested_offset.data_ptr<float>(), stream()),
        "quantize_absmax", c10::str(absmax.sizes()));
  }

  void dequantize_4bit(const Packed4bit& w, int64_t K, const Slice& slice, const Tensor& out) const override {
    const c10::cuda::CUDAGuard guard(out.device());
    check_launch(cuda::launch_dequantize_4bit(w, K, slice, dtype_of(out.scalar_type()), out.data_ptr(), stream()),
                 "dequantize_4bit",
                 c10::str("rows ", slice.row_begin, " to ", slice.row_end, ", columns ", slice.column_begin, " to ",
                          slice.column_end, " of ", K, ", ", describe(w), ", ", out.scalar_type()));
  }

  void adamw(const AdamwSlice* slices, int64_t n, const AdamwOptions& options, const Tensor& like) const override {
    const c10::cuda::CUDAGuard guard(like.device());
    const Tensor filled = at::empty({cuda::adamw_table_bytes(n)}, like.options().dtype(at::kByte).device(at::kCPU));
    cuda::fill_adamw_table(slices, n, options, filled.data_ptr());
    const Tensor table = filled.to(like.device());
    check_launch(cuda::launch_adamw(table.const_data_ptr(), n, adamw_blocks(slices, n), options, stream()),
                 "adamw_step", c10::str(n, " slices, ", adamw_blocks(slices, n), " blocks of ", kAdamwBlock));
  }

  void dropout_mask(const Tensor& seed, uint32_t kept_below, const Tensor& mask) const override {
    const c10::cuda::CUDAGuard guard(mask.device());
    check_launch(cuda::launch_dropout_mask(seed.const_data_ptr<int64_t>(), kept_below, mask.numel(),
                                           static_cast<uint8_t*>(mask.data_ptr()), stream()),
                 "dropout_mask", c10::str(mask.sizes()));
  }

  int64_t workspace_bytes(const Tensor& like) const override {
    constexpr int64_t kMost = 32 << 20;
    const int64_t l2 = attribute(cudaDevAttrL2CacheSize, like.get_device());
    return std::clamp<int64_t>(l2 / 2, 1 << 20, kMost);
  }

  at::ScalarType compute_dtype(at::ScalarType dtype) const override { return dtype; }

  bool fused_linear_4bit(const Tensor& x_arg, const Packed4bit& w, const Tensor& bias_arg, LowRankList added,
                         const Tensor& y) const override {
    if (x_arg.size(0) > cuda::kMostFusedRows) return false;
    const Tensor x = aligned(x_arg);
    const Tensor bias = bias_arg.defined() ? bias_arg.contiguous() : bias_arg;
    return launch_fused("linear_4bit", cuda::linear_4bit_workspace_bytes, cuda::launch_linear_4bit, y, added,
                        {x.const_data_ptr(), w, bias.defined() ? bias.const_data_ptr() : nullptr, y.data_ptr(),
                         x.size(0), y.size(1), x.size(1), dtype_of(x.scalar_type())});
  }

  bool fused_linear_4bit_dgrad(const Tensor& grad_arg, const Packed4bit& w, LowRankList added,
                               const Tensor& grad_x) const override {
    if (grad_arg.size(0) > cuda::kMostFusedRows) return false;
    const Tensor grad = aligned(grad_arg);
    return launch_fused("linear_4bit_dgrad", cuda::linear_4bit_dgrad_workspace_bytes, cuda::launch_linear_4bit_dgrad,
                        grad_x, added,
                        {grad.const_data_ptr(), w, nullptr, grad_x.data_ptr(), grad.size(0), grad.size(1),
                         grad_x.size(1), dtype_of(grad.scalar_type())});
  }

 private:
  // Contiguous, on the 16-byte boundary that views need not have.
  static Tensor aligned(const Tensor& tensor) {
    const Tensor contiguous = tensor.contiguous();
    return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous : contiguous.clone();
  }

  static cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

  template <typename WorkspaceBytes, typename Launch>
  static bool launch_fused(const char* op, WorkspaceBytes workspace_bytes, Launch launch, const Tensor& out,
                           LowRankList added, const cuda::Product4bit& product) {
    const int device = out.get_device();
    if (attribute(cudaDevAttrComputeCapabilityMajor, device) < cuda::kLeastFusedMajor) return false;
    if (!cuda::takes_fused(product)) {
      if (product.dtype != DType::Float32) {
        TORCH_WARN_ONCE(op,
                        ": few rows, but not for the fused kernel, which takes whole blocks of 32 to 256 in a row, an "
                        "even out_features and 16-byte alignment; got M ",
                        product.M, ", N ", product.N, ", K ", product.K, ", ", describe(product.w),
                        ". Decoding slices instead, which is slower");
      }
      return false;
    }
    const c10::cuda::CUDAGuard guard(out.device());
    const cuda::DeviceLimits limits = {attribute(cudaDevAttrMultiProcessorCount, device),
                                       attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
    const Tensor workspace = at::empty({workspace_bytes(product, limits)}, out.options().dtype(at::kByte));
    check_launch(launch(product, limits, workspace.data_ptr(), stream()), op,
                 c10::str("M ", product.M, ", N ", product.N, ", K ", product.K, ", ", out.scalar_type(), ", ",
                          describe(product.w)));
    add_low_rank(out, added);
    return true;
  }
};

const bool registered = [] {
  static const Cuda cuda;
  register_cuda_device(cuda);
  return true;
}();

}  // namespace
}  // namespace qlora

TORCH_LIBRARY_IMPL(qlora_ext, CUDA, m) { qlora::register_ops(m); }
