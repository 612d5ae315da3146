// The products with a 4-bit weight: by the device's fused kernels, or on slices of the decoded weight by torch's
// multiply.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "ops.h"

namespace qlora {
namespace {

using at::Tensor;

// Of `total` rows or columns, how many a slice takes so that it fits the workspace; slices of about the same size,
// since a narrow last one is multiplied by a slower and less exact kernel.
int64_t slice_size(int64_t workspace_bytes, int64_t total, int64_t bytes_each) {
  const int64_t slices = ceil_div(total * bytes_each, workspace_bytes);
  const int64_t size = std::max<int64_t>(1, ceil_div(total, std::max<int64_t>(1, slices)));
  return size < 256 ? size : ceil_div(size, 64) * 64;  // BLAS libraries want aligned rows
}

// x @ W^T + bias, the weight decoded a slice of rows at a time.
void multiply_slices(const Tensor& x, const Packed4bit& w, const Tensor& bias, const Tensor& y) {
  const int64_t N = y.size(1), K = x.size(1);
  const Device& device = device_for(x);
  const int64_t step = slice_size(device.workspace_bytes(x), N, K * x.element_size());
  Tensor workspace = at::empty({std::min(step, N), K}, x.options());
  for (int64_t begin = 0; begin < N; begin += step) {
    const int64_t count = std::min(step, N - begin);
    device.dequantize_4bit(w, K, {begin, begin + count, 0, K}, workspace);
    const Tensor weight_t = workspace.narrow(0, 0, count).t();
    Tensor out = y.narrow(1, begin, count);
    if (bias.defined()) {
      at::addmm_out(out, bias.narrow(0, begin, count), x, weight_t);
    } else {
      at::mm_out(out, x, weight_t);
    }
  }
}

// grad @ W. The weight is cut by columns, so that no slice adds onto another's rounded sum.
void multiply_slices_dgrad(const Tensor& grad, const Packed4bit& w, const Tensor& grad_x) {
  const int64_t N = grad.size(1), K = grad_x.size(1);
  const Device& device = device_for(grad);
  // Cut where vector kernels want it, unless blocks are so large that a slice would be the whole weight.
  const int64_t boundary = std::min<int64_t>(w.blocksize, 256);
  const int64_t step =
      ceil_div(slice_size(device.workspace_bytes(grad), K, N * grad.element_size()), boundary) * boundary;
  Tensor workspace = at::empty({N * std::min(step, K)}, grad.options());
  for (int64_t begin = 0; begin < K; begin += step) {
    const int64_t count = std::min(step, K - begin);
    device.dequantize_4bit(w, K, {0, N, begin, begin + count}, workspace);
    Tensor part = grad_x.narrow(1, begin, count);
    at::mm_out(part, grad, workspace.narrow(0, 0, N * count).view({N, count}));
  }
}

}  // namespace

void multiply(const Tensor& x, const Packed4bit& w, const Tensor& bias, LowRankList added, const Tensor& y) {
  const Device& device = device_for(x);
  if (y.numel() == 0 || device.fused_linear_4bit(x, w, bias, added, y)) return;
  const auto compute = device.compute_dtype(x.scalar_type());
  const Tensor out = compute == y.scalar_type() ? y : at::empty(y.sizes(), y.options().dtype(compute));
  multiply_slices(x.to(compute), w, bias.defined() ? bias.to(compute) : bias, out);
  add_low_rank(out, added);
  if (!out.is_same(y)) y.copy_(out);
}

void multiply_dgrad(const Tensor& grad, const Packed4bit& w, LowRankList added, const Tensor& grad_x) {
  const Device& device = device_for(grad);
  if (grad_x.numel() == 0 || device.fused_linear_4bit_dgrad(grad, w, added, grad_x)) return;
  const auto compute = device.compute_dtype(grad.scalar_type());
  const Tensor out =
      compute == grad_x.scalar_type() ? grad_x : at::empty(grad_x.sizes(), grad_x.options().dtype(compute));
  multiply_slices_dgrad(grad.to(compute), w, out);
  add_low_rank(out, added);
  if (!out.is_same(grad_x)) grad_x.copy_(out);
}

Tensor multiply(const LinearArguments& arguments, const Tensor& bias, LowRankList added) {
  const auto& [N, K, w, x] = arguments;
  Tensor y = new_result({x.size(0), N}, x.options());
  multiply(x, w.view, bias, added, y);
  return y;
}

Tensor multiply_dgrad(const LinearArguments& arguments, LowRankList added) {
  const auto& [N, K, w, grad] = arguments;
  Tensor grad_x = new_result({grad.size(0), K}, grad.options());
  multiply_dgrad(grad, w.view, added, grad_x);
  return grad_x;
}

}  // namespace qlora
