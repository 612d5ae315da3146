// lora_linear_4bit and its gradients: a 4-bit linear layer with adapters in one op, on any device.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <utility>
#include <vector>

#include "ops.h"

namespace qlora {
namespace {

using at::Tensor;

// Which elements of the rows dropout keeps before adapter i; undefined if all. The backward pass draws them again, so
// that no mask is stored between the passes.
Tensor mask_before(size_t i, const Tensor& rows, c10::ArrayRef<double> keep, const OptionalTensor& seed) {
  if (keep.empty() || keep[i] == 1) return {};
  return dropout_mask(rows, keep[i], seed->reshape({-1}).select(0, static_cast<int64_t>(i)));
}

// Side by side, or one below the other.
Tensor joined(const std::vector<Tensor>& parts, int64_t dim) {
  return parts.size() == 1 ? parts[0].contiguous() : at::cat(parts, dim);
}

// y = linear_4bit(x) + sum_i scaling_i ((x * mask_i) A_i^T) B_i^T; xA: the (x * mask_i) A_i^T side by side, in x's
// dtype.
std::tuple<Tensor, Tensor> lora_linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                            std::string quant_type, int64_t blocksize, int64_t out_features,
                                            const OptionalTensor& bias_arg, at::TensorList A, at::TensorList B,
                                            c10::ArrayRef<double> scaling, c10::ArrayRef<double> keep,
                                            const OptionalTensor& seed) {
  constexpr const char* kOp = "lora_linear_4bit";
  const PlainDispatch plain;
  const LinearArguments arguments =
      check_linear(kOp, x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, out_features);
  const Tensor bias = check_bias(kOp, bias_arg, x, out_features);
  check_adapters(kOp, x, out_features, A, B, scaling, keep, seed);
  const Device& device = device_for(x);
  const auto dtype = x.scalar_type();
  const auto compute = device.compute_dtype(dtype);
  std::vector<Tensor> xA;
  std::vector<LowRank> added;
  if (keep.empty()) {
    const Tensor stacked = A.size() == 1 ? A[0] : at::cat(A, 0);
    xA.push_back(device.mm({arguments.rows, {}}, {stacked.t(), {}}, 1.0, compute, dtype));
  } else {
    for (size_t i = 0; i < A.size(); ++i) {
      const Tensor mask = mask_before(i, arguments.rows, keep, seed);
      xA.push_back(device.mm({arguments.rows, mask}, {A[i].t(), {}}, 1.0, compute, dtype));
    }
  }
  const Tensor all_xA = joined(xA, 1);
  int64_t first = 0;
  for (size_t i = 0; i < A.size(); ++i) {
    const int64_t r = A[i].size(0);
    added.push_back({all_xA.narrow(1, first, r), B[i].t(), scaling[i], {}});
    first += r;
  }
  return {in_shape_of(multiply(arguments, bias, added), x), all_xA};
}

// With g_i = scaling_i grad B_i:  grad_x = grad W + sum_i mask_i * (g_i A_i),  grad_A_i = g_i^T (x * mask_i) and
// grad_B_i = scaling_i grad^T xA_i. grad_A is stacked, [sum r, K]; so is grad_B, transposed, [sum r, N]; both are
// float32. What is not wanted of the three is empty. Of x only grad_A needs the values.
std::tuple<Tensor, Tensor, Tensor> lora_linear_4bit_backward(
    const Tensor& grad_arg, const Tensor& x_arg, const Tensor& xA, const Tensor& packed, const Tensor& absmax,
    const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize,
    at::TensorList A, at::TensorList B, c10::ArrayRef<double> scaling, c10::ArrayRef<double> keep,
    const OptionalTensor& seed, bool with_grad_x, bool with_grad_A, bool with_grad_B) {
  constexpr const char* kOp = "lora_linear_4bit_backward";
  const PlainDispatch plain;
  QLORA_CHECK(x_arg.dim() >= 1, kOp, "x", "at least 1 dimension", x_arg.sizes());
  const int64_t K = x_arg.size(-1);
  const LinearArguments arguments =
      check_dgrad(kOp, grad_arg, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, K);
  check_adapters(kOp, x_arg, arguments.N, A, B, scaling, keep, seed);
  const Tensor& grad = arguments.rows;
  const Tensor x = as_rows(x_arg);
  const int64_t M = x.size(0), ranks = total_rank(A);
  QLORA_CHECK(grad.size(0) == M, kOp, "grad", std::to_string(M) + " rows, as x", grad.size(0));
  QLORA_CHECK(xA.dim() == 2 && xA.size(0) == M && xA.size(1) == ranks, kOp, "xA",
              "shape [" + std::to_string(M) + ", " + std::to_string(ranks) + "]", xA.sizes());
  for (const auto& [what, tensor] : {std::pair{"x", &x}, std::pair{"xA", &xA}}) {
    QLORA_CHECK_TYPE(tensor->scalar_type() == grad.scalar_type(), kOp, what, grad.scalar_type(), tensor->scalar_type());
    check_device(kOp, what, *tensor, grad);
  }

  const Device& device = device_for(grad);
  const auto compute = device.compute_dtype(grad.scalar_type());
  std::vector<LowRank> added;
  for (size_t i = 0; (with_grad_x || with_grad_A) && i < A.size(); ++i) {
    const Tensor g = device.mm({grad, {}}, {B[i], {}}, scaling[i], compute, at::kFloat);
    added.push_back({g, A[i], 1.0, mask_before(i, x, keep, seed)});
  }
  // Before the adapters' gradients: g has left grad's rows in the caches of the threads that read them again here.
  const Tensor grad_x =
      with_grad_x ? in_shape_of(multiply_dgrad(arguments, added), grad_arg) : at::empty({0}, grad.options());
  std::vector<Tensor> grad_A, grad_B;
  int64_t first = 0;
  for (size_t i = 0; i < A.size(); ++i) {
    const Tensor low_rank = xA.narrow(1, first, A[i].size(0));
    if (with_grad_A) grad_A.push_back(device.mm({added[i].x.t(), {}}, {x, added[i].mask}, 1.0, compute, at::kFloat));
    if (with_grad_B) grad_B.push_back(device.mm({low_rank.t(), {}}, {grad, {}}, scaling[i], compute, at::kFloat));
    first += A[i].size(0);
  }
  const auto stacked = [&](const std::vector<Tensor>& parts) {
    return parts.empty() ? at::empty({0}, grad.options().dtype(at::kFloat)) : joined(parts, 0);
  };
  return {grad_x, stacked(grad_A), stacked(grad_B)};
}

}  // namespace

void register_lora_ops(torch::Library& m) {
  m.impl("lora_linear_4bit", lora_linear_4bit);
  m.impl("lora_linear_4bit_backward", lora_linear_4bit_backward);
}

}  // namespace qlora
