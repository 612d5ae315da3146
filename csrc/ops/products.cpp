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

constexpr int64_t kNarrow = 64;

// `total`, or so much of it, about `most`, that its parts are of about the same size, and aligned, as BLAS libraries
// want them.
int64_t even_part(int64_t total, int64_t most) {
  const int64_t part = ceil_div(total, ceil_div(total, std::max(most, kNarrow)));
  return std::min(total, ceil_div(part, kNarrow) * kNarrow);
}

// What is taken of the rest: a part, and what would be a narrow last one, which torch multiplies more slowly and less
// exactly.
int64_t taken(int64_t part, int64_t rest) { return rest < part + kNarrow ? rest : part; }

// What of the weight is decoded at a time: so many of the result's columns, and so much of the reduction.
struct Part {
  int64_t columns, depth;
};

// It should fit the workspace. The reduction is cut only in fp32, and only where it is so long that few columns would
// be left, whose products torch makes of long chains of additions, and slowly: with each cut the sums are rounded.
Part choose_part(const Tensor& out, int64_t reduction) {
  constexpr int64_t kFewColumns = 256;
  const int64_t room = device_for(out).workspace_bytes(out) / out.element_size();
  const int64_t columns = even_part(out.size(1), room / std::max<int64_t>(reduction, 1));
  if (columns >= std::min(out.size(1), kFewColumns) || out.scalar_type() != at::kFloat) return {columns, reduction};
  const int64_t more = even_part(out.size(1), kFewColumns);
  return {more, even_part(reduction, room / more)};
}

// out = a @ b + bias + added. decode(r, depth, j, columns, workspace) is a part of b from row r and column j on, dense.
template <typename Decode>
void multiply_parts(const Tensor& a_arg, const Tensor& bias_arg, LowRankList added, const Tensor& out_arg,
                    Decode&& decode) {
  const auto compute = device_for(out_arg).compute_dtype(out_arg.scalar_type());
  const Tensor a = a_arg.to(compute), bias = bias_arg.defined() ? bias_arg.to(compute) : bias_arg;
  const Tensor out =
      compute == out_arg.scalar_type() ? out_arg : at::empty(out_arg.sizes(), out_arg.options().dtype(compute));
  const int64_t reduction = a.size(1), J = out.size(1);
  const Part part = choose_part(out, reduction);
  const int64_t most = std::min(part.columns + kNarrow, J) * std::min(part.depth + kNarrow, reduction);
  const Tensor workspace = at::empty({most}, a.options());
  for (int64_t j = 0, columns; j < J; j += columns) {
    columns = taken(part.columns, J - j);
    Tensor sums = out.narrow(1, j, columns);
    int64_t r = 0;
    do {  // once for an empty reduction, too
      const int64_t depth = taken(part.depth, reduction - r);
      const Tensor x = a.narrow(1, r, depth);
      const Tensor b = decode(r, depth, j, columns, workspace.narrow(0, 0, depth * columns));
      if (r > 0) {
        sums.addmm_(x, b);
      } else if (bias.defined()) {
        at::addmm_out(sums, bias.narrow(0, j, columns), x, b);
      } else {
        at::mm_out(sums, x, b);
      }
      r += depth;
    } while (r < reduction);
  }
  add_low_rank(out, added);
  if (!out.is_same(out_arg)) out_arg.copy_(out);
}

}  // namespace

void multiply(const Tensor& x, const Packed4bit& w, const Tensor& bias, LowRankList added, const Tensor& y) {
  const Device& device = device_for(x);
  if (y.numel() == 0 || device.fused_linear_4bit(x, w, bias, added, y)) return;
  multiply_parts(x, bias, added, y, [&](int64_t r, int64_t depth, int64_t j, int64_t columns, const Tensor& workspace) {
    device.dequantize_4bit(w, x.size(1), {j, j + columns, r, r + depth}, workspace);
    return workspace.view({columns, depth}).t();
  });
}

void multiply_dgrad(const Tensor& grad, const Packed4bit& w, LowRankList added, const Tensor& grad_x) {
  const Device& device = device_for(grad);
  if (grad_x.numel() == 0 || device.fused_linear_4bit_dgrad(grad, w, added, grad_x)) return;
  const int64_t K = grad_x.size(1);
  multiply_parts(grad, {}, added, grad_x,
                 [&](int64_t r, int64_t depth, int64_t j, int64_t columns, const Tensor& workspace) {
                   device.dequantize_4bit(w, K, {r, r + depth, j, j + columns}, workspace);
                   return workspace.view({depth, columns});
                 });
}

Tensor multiply(const LinearArguments& arguments, const Tensor& bias, LowRankList added) {
  const auto& [N, K, w, x] = arguments;
  Tensor y = at::empty({x.size(0), N}, x.options());
  multiply(x, w.view, bias, added, y);
  return y;
}

Tensor multiply_dgrad(const LinearArguments& arguments, LowRankList added) {
  const auto& [N, K, w, grad] = arguments;
  Tensor grad_x = at::empty({grad.size(0), K}, grad.options());
  multiply_dgrad(grad, w.view, added, grad_x);
  return grad_x;
}

}  // namespace qlora
