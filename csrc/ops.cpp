// The ops of torch.ops.qlora_ext: schemas, argument checks, allocation, and the sliced path. What they compute with is
// the Device of their tensors.
#include "ops.h"

#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "device.h"

namespace qlora {
namespace {

using at::Tensor;

const Device* cuda_device = nullptr;

// --- quantize_4bit, quantize_absmax, dequantize_4bit --------------------------------------------------------------

// Row layout [..., K / per] where whole blocks fill a row, else flat [ceil(n / per)]: the bytes are the same.
std::vector<int64_t> layout(const Tensor& weight, int64_t blocksize, int64_t per) {
  if (weight.dim() == 0 || weight.size(-1) % blocksize != 0) return {ceil_div(weight.numel(), per)};
  auto sizes = weight.sizes().vec();
  sizes.back() /= per;
  return sizes;
}

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& weight_arg, std::string quant_type, int64_t blocksize) {
  constexpr const char* kOp = "quantize_4bit";
  const DType dtype = checked_dtype(kOp, "weight", weight_arg.scalar_type());
  const QuantType type = checked_quant_type(kOp, quant_type);
  check_blocksize(kOp, blocksize);
  const Tensor weight = weight_arg.contiguous();
  Tensor packed = at::empty(layout(weight, blocksize, 2), weight.options().dtype(at::kByte));
  Tensor absmax = at::empty(layout(weight, blocksize, blocksize), weight.options().dtype(at::kFloat));
  device_for(weight).quantize_4bit(weight, dtype, type, blocksize, packed, absmax);
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax_arg) {
  QLORA_CHECK_TYPE(absmax_arg.scalar_type() == at::kFloat, "quantize_absmax", "absmax", "dtype float32",
                   absmax_arg.scalar_type());
  const Tensor absmax = absmax_arg.contiguous();
  Tensor codes = at::empty(absmax.sizes(), absmax.options().dtype(at::kByte));
  Tensor nested_absmax = at::empty({ceil_div(absmax.numel(), kNestedBlocksize)}, absmax.options());
  Tensor nested_offset = at::empty({}, absmax.options());
  device_for(absmax).quantize_absmax(absmax, codes, nested_absmax, nested_offset);
  return {codes, nested_absmax, nested_offset};
}

Tensor dequantize_4bit(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                       const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize,
                       at::IntArrayRef shape, at::ScalarType dtype) {
  constexpr const char* kOp = "dequantize_4bit";
  const DType type = checked_dtype(kOp, "dtype", dtype);
  const bool negative = std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; });
  QLORA_CHECK(!negative, kOp, "shape", "sizes of at least 0", shape);
  const int64_t n = c10::multiply_integers(shape);
  const Weight4bit w(kOp, n, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize);
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  device_for(out).dequantize_4bit(w.view, n, {0, 1, 0, n}, type, out);
  return out;
}

// --- linear_4bit, linear_4bit_dgrad: the sliced path --------------------------------------------------------------

// x as a matrix, in the type that it is multiplied in.
Tensor as_rows(const Tensor& x) {
  const int64_t count = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return x.reshape({count, x.size(-1)}).to(device_for(x).compute_dtype(x.scalar_type()));
}

Tensor in_shape_of(const Tensor& rows, const Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.back() = rows.size(1);
  // No view: an in-place operation on the result (nn.ReLU(inplace=True)) must be allowed.
  return at::_unsafe_view(rows, sizes).to(x.scalar_type());
}

// The last dimension of x, after the checks that come before the weight's own.
int64_t inner_size(const char* op, const char* what, const Tensor& x, const Tensor& packed, const char* outer_what,
                   int64_t outer) {
  checked_dtype(op, what, x.scalar_type());
  QLORA_CHECK(outer >= 0, op, outer_what, "at least 0", outer);
  QLORA_CHECK(x.dim() >= 1, op, what, "at least 1 dimension", x.sizes());
  check_device(op, "packed", packed, x);
  return x.size(-1);
}

// Of `total` rows or columns, how many a slice takes so that it fits the workspace; slices of about the same size,
// since a narrow last one is multiplied by a slower and less exact kernel.
int64_t slice_size(int64_t workspace_bytes, int64_t total, int64_t bytes_each) {
  const int64_t slices = ceil_div(total * bytes_each, workspace_bytes);
  const int64_t size = std::max<int64_t>(1, ceil_div(total, std::max<int64_t>(1, slices)));
  return size < 256 ? size : ceil_div(size, 64) * 64;  // BLAS libraries want aligned rows
}

// linear_4bit for the op of this name.
Tensor multiply(const char* op, const Tensor& x, const Tensor& packed, const Tensor& absmax,
                const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset, const std::string& quant_type,
                int64_t blocksize, int64_t N, const OptionalTensor& bias) {
  const int64_t K = inner_size(op, "x", x, packed, "out_features", N);
  const Weight4bit w(op, N * K, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize);
  const Tensor rows = as_rows(x);
  const DType dtype = checked_dtype(op, "x", rows.scalar_type());
  Tensor b;
  if (bias.has_value()) {
    check_device(op, "bias", *bias, x);
    QLORA_CHECK(bias->dim() == 1 && bias->size(0) == N, op, "bias", "shape [" + std::to_string(N) + "]", bias->sizes());
    checked_dtype(op, "bias", bias->scalar_type());
    b = bias->to(rows.scalar_type());
  }
  Tensor y = at::empty({rows.size(0), N}, rows.options());
  if (rows.size(0) == 0) return in_shape_of(y, x);
  const Device& device = device_for(rows);
  if (device.fused_linear_4bit(rows, w.view, b, dtype, y)) return in_shape_of(y, x);
  const int64_t step = slice_size(device.workspace_bytes(rows), N, K * itemsize(dtype));
  Tensor workspace = at::empty({std::min(step, N), K}, rows.options());
  for (int64_t begin = 0; begin < N; begin += step) {
    const int64_t count = std::min(step, N - begin);
    device.dequantize_4bit(w.view, K, {begin, begin + count, 0, K}, dtype, workspace);
    const Tensor weight_t = workspace.narrow(0, 0, count).t();
    Tensor out = y.narrow(1, begin, count);
    if (b.defined()) {
      at::addmm_out(out, b.narrow(0, begin, count), rows, weight_t);
    } else {
      at::mm_out(out, rows, weight_t);
    }
  }
  return in_shape_of(y, x);
}

Tensor linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                   const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize, int64_t out_features,
                   const OptionalTensor& bias) {
  return multiply("linear_4bit", x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out_features,
                  bias);
}

// grad_x[M, K] = grad[M, N] @ W[N, K]. The weight is cut by columns, so that no slice adds onto another's rounded sum.
Tensor linear_4bit_dgrad(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                         std::string quant_type, int64_t blocksize, int64_t in_features) {
  constexpr const char* kOp = "linear_4bit_dgrad";
  const int64_t K = in_features;
  const int64_t N = inner_size(kOp, "grad", grad, packed, "in_features", K);
  const Weight4bit w(kOp, N * K, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize);
  const Tensor rows = as_rows(grad);
  const DType dtype = checked_dtype(kOp, "grad", rows.scalar_type());
  Tensor out = at::empty({rows.size(0), K}, rows.options());
  if (rows.size(0) == 0) return in_shape_of(out, grad);
  const Device& device = device_for(rows);
  if (device.fused_linear_4bit_dgrad(rows, w.view, dtype, out)) return in_shape_of(out, grad);
  // Borders where vector kernels have them, unless blocks are so large that a slice would be the whole weight.
  const int64_t border = std::min<int64_t>(blocksize, 256);
  const int64_t step = ceil_div(slice_size(device.workspace_bytes(rows), K, N * itemsize(dtype)), border) * border;
  Tensor workspace = at::empty({N * std::min(step, K)}, rows.options());
  for (int64_t begin = 0; begin < K; begin += step) {
    const int64_t count = std::min(step, K - begin);
    device.dequantize_4bit(w.view, K, {0, N, begin, begin + count}, dtype, workspace);
    Tensor part = out.narrow(1, begin, count);
    at::mm_out(part, rows, workspace.narrow(0, 0, N * count).view({N, count}));
  }
  return in_shape_of(out, grad);
}

// --- lora_linear_4bit ---------------------------------------------------------------------------------------------

// The adapters side by side: rows of A, or columns of B times scaling, in the compute dtype.
Tensor stack_A(at::TensorList A, at::ScalarType dtype) { return at::cat(A, 0).to(dtype); }

Tensor stack_B(at::TensorList B, c10::ArrayRef<double> scaling, at::ScalarType dtype) {
  std::vector<Tensor> scaled;
  for (size_t i = 0; i < B.size(); ++i) scaled.push_back(at::mul(B[i], scaling[i]));
  return at::cat(scaled, 1).to(dtype);
}

// y = linear_4bit(x) + sum_i scaling_i ((x * dropout_mask_i) A_i^T) B_i^T; xA: the (x * mask_i) A_i^T side by side.
// All adapters go into y in one multiply-add: y is read and written once however many there are.
std::tuple<Tensor, Tensor> lora_linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                            std::string quant_type, int64_t blocksize, int64_t out_features,
                                            const OptionalTensor& bias, at::TensorList A, at::TensorList B,
                                            c10::ArrayRef<double> scaling, at::TensorList dropout_mask) {
  constexpr const char* kOp = "lora_linear_4bit";
  Tensor y = multiply(kOp, x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out_features, bias);
  check_adapters(kOp, x, out_features, A, B, scaling, dropout_mask);
  const Tensor rows = as_rows(x);
  const Tensor stacked_A = stack_A(A, rows.scalar_type());
  Tensor xA = at::empty({rows.size(0), stacked_A.size(0)}, rows.options());
  if (dropout_mask.empty()) {
    at::mm_out(xA, rows, stacked_A.t());
  } else {
    int64_t first = 0;
    for (size_t i = 0; i < A.size(); ++i) {
      const int64_t r = A[i].size(0);
      Tensor part = xA.narrow(1, first, r);
      at::mm_out(part, at::mul(rows, dropout_mask[i].reshape_as(rows)), stacked_A.narrow(0, first, r).t());
      first += r;
    }
  }
  Tensor y_rows = y.view({rows.size(0), out_features}).to(rows.scalar_type());
  at::addmm_out(y_rows, y_rows, xA, stack_B(B, scaling, rows.scalar_type()).t());
  return {in_shape_of(y_rows, y), xA.to(x.scalar_type())};
}

}  // namespace

const Device& device_for(const Tensor& tensor) { return tensor.is_cuda() ? *cuda_device : cpu_device(); }

void register_cuda_device(const Device& device) { cuda_device = &device; }

void register_ops(torch::Library& m) {
  m.impl("quantize_4bit", quantize_4bit);
  m.impl("quantize_absmax", quantize_absmax);
  m.impl("dequantize_4bit", dequantize_4bit);
  m.impl("linear_4bit", linear_4bit);
  m.impl("linear_4bit_dgrad", linear_4bit_dgrad);
  m.impl("lora_linear_4bit", lora_linear_4bit);
}

}  // namespace qlora

TORCH_LIBRARY(qlora_ext, m) {
  m.def("quantize_4bit(Tensor weight, str quant_type, int blocksize) -> (Tensor packed, Tensor absmax)");
  m.def("quantize_absmax(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)");
#define QLORA_WEIGHT \
  "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, str quant_type, int blocksize"
  m.def("dequantize_4bit(" QLORA_WEIGHT ", SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def("linear_4bit(Tensor x, " QLORA_WEIGHT ", SymInt out_features, Tensor? bias) -> Tensor");
  m.def("linear_4bit_dgrad(Tensor grad, " QLORA_WEIGHT ", SymInt in_features) -> Tensor");
  m.def("lora_linear_4bit(Tensor x, " QLORA_WEIGHT
        ", SymInt out_features, Tensor? bias, Tensor[] A, Tensor[] B, float[] scaling, Tensor[] dropout_mask)"
        " -> (Tensor y, Tensor xA)");
#undef QLORA_WEIGHT
}

TORCH_LIBRARY_IMPL(qlora_ext, CPU, m) { qlora::register_ops(m); }
