// What the ops ask of a device; one implementation each in ops_cpu.cpp and ops_cuda.cpp.
#pragma once

#include <ATen/Tensor.h>

#include "codec.h"

namespace qlora {

// Arguments are checked, contiguous and on the device, results allocated.
class Device {
 public:
  // packed and absmax of weight.
  virtual void quantize_4bit(const at::Tensor& weight, DType dtype, QuantType quant_type, int64_t blocksize,
                             const at::Tensor& packed, const at::Tensor& absmax) const = 0;

  // codes, nested_absmax and nested_offset of absmax.
  virtual void quantize_absmax(const at::Tensor& absmax, const at::Tensor& codes, const at::Tensor& nested_absmax,
                               const at::Tensor& nested_offset) const = 0;

  // The slice of the weight [*, K], dense, into out.
  virtual void dequantize_4bit(const Packed4bit& w, int64_t K, const Slice& slice, DType dtype,
                               const at::Tensor& out) const = 0;

  // The size of the workspace on the tensor's device that a slice of the weight is decoded into: it should stay in the
  // cache between decoding and multiplying.
  virtual int64_t workspace_bytes(const at::Tensor& like) const = 0;

  // The type a product of this type is computed in.
  virtual at::ScalarType compute_dtype(at::ScalarType dtype) const = 0;

  // y[M, N] = x[M, K] @ W[N, K]^T + bias and grad_x[M, K] = grad[M, N] @ W[N, K] in one kernel, without a workspace of
  // decoded weights. False if the device has no kernel for these arguments.
  virtual bool fused_linear_4bit(const at::Tensor& x, const Packed4bit& w, const at::Tensor& bias, DType dtype,
                                 const at::Tensor& y) const = 0;
  virtual bool fused_linear_4bit_dgrad(const at::Tensor& grad, const Packed4bit& w, DType dtype,
                                       const at::Tensor& grad_x) const = 0;

 protected:
  ~Device() = default;
};

const Device& cpu_device();

// The device of the tensor.
const Device& device_for(const at::Tensor& tensor);

// Called once by ops_cuda.cpp, if the extension is built for CUDA.
void register_cuda_device(const Device& device);

}  // namespace qlora
