// What the ops ask of a device; one implementation each in device_cpu.cpp and device_cuda.cpp, what they share in
// device.cpp.
#pragma once

#include <ATen/Tensor.h>

#include "../adamw.h"
#include "../codec.h"

namespace qlora {

// A matrix whose elements count as 0 where the mask of its shape, if it is defined, is false. Both may have any
// strides.
struct MaskedMatrix {
  at::Tensor values, mask;
};

// What an adapter adds to a product [M, J]: scale * x[M, r] @ factor[r, J], where the mask [M, J], if defined, is true.
struct LowRank {
  at::Tensor x, factor;
  double scale;
  at::Tensor mask;
};
using LowRankList = c10::ArrayRef<LowRank>;

// Arguments are checked and on the device, results allocated and contiguous. Weights are contiguous; x, gradients,
// factors and masks may have any strides.
class Device {
 public:
  // packed and absmax of weight.
  virtual void quantize_4bit(const at::Tensor& weight, QuantType quant_type, int64_t blocksize,
                             const at::Tensor& packed, const at::Tensor& absmax) const = 0;

  // codes, nested_absmax and nested_offset of absmax.
  virtual void quantize_absmax(const at::Tensor& absmax, const at::Tensor& codes, const at::Tensor& nested_absmax,
                               const at::Tensor& nested_offset) const = 0;

  // The slice of the weight [*, K], dense, into out.
  virtual void dequantize_4bit(const Packed4bit& w, int64_t K, const Slice& slice, const at::Tensor& out) const = 0;

  // Which elements dropout keeps: each with probability kept_below / 2^32, by the seed, a number, and its index alone.
  virtual void dropout_mask(const at::Tensor& seed, uint32_t kept_below, const at::Tensor& mask) const = 0;

  // The size of the workspace on the tensor's device that a slice of the weight is decoded into: it should stay in the
  // cache between decoding and multiplying.
  virtual int64_t workspace_bytes(const at::Tensor& like) const = 0;

  // The type that a product of this type is computed in by torch, on slices of decoded weights.
  virtual at::ScalarType compute_dtype(at::ScalarType dtype) const = 0;

  // y[M, N] = x[M, K] @ W[N, K]^T + bias + added and grad_x[M, K] = grad[M, N] @ W[N, K] + added without decoding the
  // weight to memory. False if the device has no kernel for these arguments.
  virtual bool fused_linear_4bit(const at::Tensor& x, const Packed4bit& w, const at::Tensor& bias, LowRankList added,
                                 const at::Tensor& y) const = 0;
  virtual bool fused_linear_4bit_dgrad(const at::Tensor& grad, const Packed4bit& w, LowRankList added,
                                       const at::Tensor& grad_x) const = 0;

  // The update of n slices that lie on the device of `like`.
  virtual void adamw(const AdamwSlice* slices, int64_t n, const AdamwOptions& options,
                     const at::Tensor& like) const = 0;

  // scale * a[M, R] @ b[R, J] in the dtype `out`, with any strides; `compute` is the dtype to multiply in, if the
  // device has no more exact one for it.
  virtual at::Tensor mm(const MaskedMatrix& a, const MaskedMatrix& b, double scale, at::ScalarType compute,
                        at::ScalarType out) const;

 protected:
  ~Device() = default;
};

// out + added by torch's own multiplies, in the type of out.
void add_low_rank(const at::Tensor& out, LowRankList added);

const Device& cpu_device();

// The device of the tensor.
const Device& device_for(const at::Tensor& tensor);

// Called once by device_cuda.cpp, if the extension is built for CUDA.
void register_cuda_device(const Device& device);

}  // namespace qlora
