// The CPU of the ops: the kernels of cpu/, spread over torch's threads.
#include <ATen/Parallel.h>

#include <unistd.h>

#include <algorithm>

#include "check.h"
#include "cpu/kernels.h"
#include "device.h"

namespace qlora {
namespace {

using at::Tensor;

// Elements (or bytes of work) a thread should have before another is worth waking.
constexpr int64_t kGrain = 32768;

class Cpu final : public Device {
 public:
  void quantize_4bit(const Tensor& weight, DType dtype, QuantType quant_type, int64_t blocksize, const Tensor& packed,
                     const Tensor& absmax) const override {
    const int64_t n = weight.numel();
    const void* values = weight.const_data_ptr();
    auto* bytes = packed.data_ptr<uint8_t>();
    auto* scales = absmax.data_ptr<float>();
    at::parallel_for(0, ceil_div(n, blocksize), ceil_div(kGrain, blocksize), [&](int64_t begin, int64_t end) {
      cpu::quantize_4bit(values, dtype, n, blocksize, quant_type, begin, end, bytes, scales);
    });
  }

  void quantize_absmax(const Tensor& absmax, const Tensor& codes, const Tensor& nested_absmax,
                       const Tensor& nested_offset) const override {
    const int64_t n = absmax.numel();
    const auto* values = absmax.const_data_ptr<float>();
    const float offset = cpu::absmax_offset(values, n);
    *nested_offset.data_ptr<float>() = offset;
    auto* bytes = codes.data_ptr<uint8_t>();
    auto* scales = nested_absmax.data_ptr<float>();
    at::parallel_for(0, nested_absmax.numel(), kGrain / kNestedBlocksize, [&](int64_t begin, int64_t end) {
      cpu::quantize_absmax(values, n, offset, begin, end, bytes, scales);
    });
  }

  void dequantize_4bit(const Packed4bit& w, int64_t K, const Slice& slice, DType dtype,
                       const Tensor& out) const override {
    const int64_t width = slice.column_end - slice.column_begin;
    auto* bytes = static_cast<uint8_t*>(out.data_ptr());
    if (width == K) {  // one run of elements
      const int64_t first = slice.row_begin * K;
      const int64_t tile = std::max<int64_t>(w.blocksize, 4096);
      const int64_t tiles_end = ceil_div(slice.row_end * K - first, tile);
      at::parallel_for(0, tiles_end, kGrain / tile, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(first + end * tile, slice.row_end * K);
        cpu::dequantize_4bit(w, first + begin * tile, last, dtype, bytes + begin * tile * itemsize(dtype));
      });
      return;
    }
    at::parallel_for(slice.row_begin, slice.row_end, ceil_div(kGrain, width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        cpu::dequantize_4bit(w, row * K + slice.column_begin, row * K + slice.column_end, dtype,
                             bytes + (row - slice.row_begin) * width * itemsize(dtype));
      }
    });
  }

  int64_t workspace_bytes(const Tensor&) const override {
    static const int64_t bytes = [] {
      int64_t l2 = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
      l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
      return std::max<int64_t>(l2, 1 << 20);
    }();
    return bytes;
  }

  // CPUs have no fast fp16 multiply: fp32 is both faster and more exact.
  at::ScalarType compute_dtype(at::ScalarType dtype) const override { return dtype == at::kHalf ? at::kFloat : dtype; }

  bool fused_linear_4bit(const Tensor&, const Packed4bit&, const Tensor&, DType, const Tensor&) const override {
    return false;
  }
  bool fused_linear_4bit_dgrad(const Tensor&, const Packed4bit&, DType, const Tensor&) const override { return false; }
};

}  // namespace

const Device& cpu_device() {
  static const Cpu cpu;
  return cpu;
}

}  // namespace qlora
