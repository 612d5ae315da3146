// The ops of torch.ops.qlora_ext: schemas, argument checks, and allocation; those with adapters are in lora.cpp, those
// of experts in experts.cpp. What they compute with is the Device of their tensors.
#include "ops.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../huge_pages.h"

namespace qlora {
namespace {

using at::Tensor;

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
  const PlainDispatch plain;
  checked_dtype(kOp, "weight", weight_arg.scalar_type());
  const QuantType type = checked_quant_type(kOp, quant_type);
  check_blocksize(kOp, blocksize);
  const Tensor weight = weight_arg.contiguous();
  Tensor packed = new_result(layout(weight, blocksize, 2), weight.options().dtype(at::kByte));
  Tensor absmax = new_result(layout(weight, blocksize, blocksize), weight.options().dtype(at::kFloat));
  device_for(weight).quantize_4bit(weight, type, blocksize, packed, absmax);
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax_arg) {
  QLORA_CHECK_TYPE(absmax_arg.scalar_type() == at::kFloat, "quantize_absmax", "absmax", "dtype float32",
                   absmax_arg.scalar_type());
  const Tensor absmax = absmax_arg.contiguous();
  Tensor codes = new_result(absmax.sizes(), absmax.options().dtype(at::kByte));
  Tensor nested_absmax = at::empty({ceil_div(absmax.numel(), kNestedBlocksize)}, absmax.options());
  Tensor nested_offset = at::empty({}, absmax.options());
  device_for(absmax).quantize_absmax(absmax, codes, nested_absmax, nested_offset);
  return {codes, nested_absmax, nested_offset};
}

// Into out, or a new tensor if that is undefined.
Tensor dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                  const OptionalTensor& nested_offset, const std::string& quant_type, int64_t blocksize,
                  at::IntArrayRef shape, at::ScalarType dtype, Tensor out) {
  constexpr const char* kOp = "dequantize_4bit";
  checked_dtype(kOp, out.defined() ? "out" : "dtype", dtype);
  const bool negative = std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; });
  QLORA_CHECK(!negative, kOp, "shape", "sizes of at least 0", shape);
  const int64_t n = checked_count(kOp, shape);
  const Weight4bit w(kOp, n, shape.empty() ? 1 : shape.back(), packed, absmax, nested_absmax, nested_offset, quant_type,
                     blocksize);
  if (out.defined()) {
    check_device(kOp, "out", out, packed);
    QLORA_CHECK(out.is_contiguous(), kOp, "out", "a contiguous tensor", c10::str("strides ", out.strides()));
    for (const Tensor& read : {packed, absmax, nested_absmax.value_or(Tensor()), nested_offset.value_or(Tensor())}) {
      if (!read.defined()) continue;
      const auto overlap = at::get_overlap_status(out, read);
      QLORA_CHECK(overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial, kOp, "out",
                  "memory of its own", "some of what is read");
      QLORA_CHECK(!out.is_neg() && !read.is_neg(), kOp, "out", "tensors as they are", "a negated view");
    }
    out.unsafeGetTensorImpl()->bump_version();  // for the backward pass of those who saved what it was
  } else {
    out = new_result(shape, packed.options().dtype(dtype));
  }
  device_for(out).dequantize_4bit(w.view, n, {0, 1, 0, n}, out);
  return out;
}

Tensor dequantize_4bit(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                       const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize,
                       at::IntArrayRef shape, at::ScalarType dtype) {
  return dequantize(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype, {});
}

void dequantize_4bit_out(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                         const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize,
                         const Tensor& out) {
  dequantize(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out.sizes(), out.scalar_type(), out);
}

// --- linear_4bit, linear_4bit_dgrad -------------------------------------------------------------------------------

Tensor linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                   const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize, int64_t out_features,
                   const OptionalTensor& bias) {
  constexpr const char* kOp = "linear_4bit";
  const PlainDispatch plain;
  const LinearArguments arguments =
      check_linear(kOp, x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out_features);
  return in_shape_of(multiply(arguments, check_bias(kOp, bias, x, out_features), {}), x);
}

Tensor linear_4bit_dgrad(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                         std::string quant_type, int64_t blocksize, int64_t in_features) {
  const PlainDispatch plain;
  const LinearArguments arguments = check_dgrad("linear_4bit_dgrad", grad, packed, absmax, nested_absmax, nested_offset,
                                                quant_type, blocksize, in_features);
  return in_shape_of(multiply_dgrad(arguments, {}), grad);
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

}  // namespace

Tensor dropout_mask(const Tensor& x, double keep, const Tensor& seed) {
  check_dropout("dropout_mask", x, keep, seed);
  const double kept_below = std::nearbyint(keep * 0x1p32);
  const Tensor mask = at::empty(x.sizes(), x.options().dtype(at::kBool));
  if (kept_below >= 0x1p32) return mask.fill_(true);
  device_for(x).dropout_mask(seed, static_cast<uint32_t>(kept_below), mask);
  return mask;
}

LinearArguments check_linear(const char* op, const Tensor& x, const Tensor& packed, const Tensor& absmax,
                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                             const std::string& quant_type, int64_t blocksize, int64_t out_features) {
  const int64_t K = inner_size(op, "x", x, packed, "out_features", out_features);
  Weight4bit w(op, checked_count(op, {out_features, K}), K, packed, absmax, nested_absmax, nested_offset, quant_type,
               blocksize);
  return {out_features, K, std::move(w), as_rows(x)};
}

LinearArguments check_dgrad(const char* op, const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                            const std::string& quant_type, int64_t blocksize, int64_t in_features) {
  const int64_t N = inner_size(op, "grad", grad, packed, "in_features", in_features);
  Weight4bit w(op, checked_count(op, {N, in_features}), in_features, packed, absmax, nested_absmax, nested_offset,
               quant_type, blocksize);
  return {N, in_features, std::move(w), as_rows(grad)};
}

Tensor check_bias(const char* op, const OptionalTensor& bias, const Tensor& x, int64_t N) {
  if (!bias.has_value()) return {};
  check_device(op, "bias", *bias, x);
  QLORA_CHECK(bias->dim() == 1 && bias->size(0) == N, op, "bias", "shape [" + std::to_string(N) + "]", bias->sizes());
  checked_dtype(op, "bias", bias->scalar_type());
  return bias->to(x.scalar_type());
}

Tensor new_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor result = at::empty(sizes, options);
  const auto bytes = static_cast<int64_t>(result.nbytes());
  if (result.is_cpu() && bytes >= kHugePage) advise_huge_pages(result.data_ptr(), result.nbytes());
  return result;
}

Tensor as_rows(const Tensor& x) {
  const auto sizes = x.sym_sizes();
  c10::SymInt count = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) count = count * sizes[i];
  return x.reshape_symint({count, sizes.back()});
}

Tensor in_shape_of(const Tensor& rows, const Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.back() = rows.size(1);
  // No view: an in-place operation on the result (nn.ReLU(inplace=True)) must be allowed.
  return at::_unsafe_view(rows, sizes);
}

void register_ops(torch::Library& m) {
  m.impl("quantize_4bit", quantize_4bit);
  m.impl("quantize_absmax", quantize_absmax);
  m.impl("dequantize_4bit", dequantize_4bit);
  m.impl("dequantize_4bit.out", dequantize_4bit_out);
  m.impl("linear_4bit", linear_4bit);
  m.impl("linear_4bit_dgrad", linear_4bit_dgrad);
  m.impl("dropout_mask", dropout_mask);
  register_lora_ops(m);
  register_expert_ops(m);
}

}  // namespace qlora

TORCH_LIBRARY(qlora_ext, m) {
  m.def("quantize_4bit(Tensor weight, str quant_type, int blocksize) -> (Tensor packed, Tensor absmax)");
  m.def("quantize_absmax(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)");
#define QLORA_WEIGHT \
  "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, str quant_type, int blocksize"
  m.def("dequantize_4bit(" QLORA_WEIGHT ", SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def("dequantize_4bit.out(" QLORA_WEIGHT ", *, Tensor(a!) out) -> ()");
  m.def("linear_4bit(Tensor x, " QLORA_WEIGHT ", SymInt out_features, Tensor? bias) -> Tensor");
  m.def("linear_4bit_dgrad(Tensor grad, " QLORA_WEIGHT ", SymInt in_features) -> Tensor");
  m.def("lora_linear_4bit(Tensor x, " QLORA_WEIGHT
        ", SymInt out_features, Tensor? bias, Tensor[] A, Tensor[] B, float[] scaling, float[] keep, Tensor? seed)"
        " -> (Tensor y, Tensor xA)");
  m.def("lora_linear_4bit_backward(Tensor grad, Tensor x, Tensor xA, " QLORA_WEIGHT
        ", Tensor[] A, Tensor[] B, float[] scaling, float[] keep, Tensor? seed,"
        " bool with_grad_x, bool with_grad_A, bool with_grad_B)"
        " -> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
  // They wait for offs.
  const std::vector<at::Tag> tags{at::Tag::cudagraph_unsafe};
  m.def("experts_4bit(Tensor x, " QLORA_WEIGHT ", Tensor offs, SymInt out_features, bool is_transposed) -> Tensor",
        tags);
  m.def("lora_experts_4bit(Tensor x, " QLORA_WEIGHT
        ", Tensor offs, SymInt out_features, bool is_transposed, Tensor[] A, Tensor[] B, float[] scaling)"
        " -> (Tensor y, Tensor xA)",
        tags);
  m.def("lora_experts_4bit_backward(Tensor grad, Tensor x, Tensor xA, " QLORA_WEIGHT
        ", Tensor offs, bool is_transposed, Tensor[] A, Tensor[] B, float[] scaling,"
        " bool with_grad_x, bool with_grad_A, bool with_grad_B)"
        " -> (Tensor grad_x, Tensor[] grad_A, Tensor[] grad_B)",
        tags);
#undef QLORA_WEIGHT
  m.def("dropout_mask(Tensor x, float keep, Tensor seed) -> Tensor");
}

// What torch does for other ops, resolve views, ends in a crash for one that writes and returns nothing.
TORCH_LIBRARY_IMPL(qlora_ext, Negative, m) { m.impl("dequantize_4bit.out", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(qlora_ext, Conjugate, m) { m.impl("dequantize_4bit.out", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(qlora_ext, CPU, m) { qlora::register_ops(m); }
