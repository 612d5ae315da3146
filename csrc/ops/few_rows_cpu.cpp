#include "few_rows_cpu.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "../cpu/linear_4bit.h"
#include "../cpu/linear_4bit_dgrad.h"
#include "check.h"
#include "parallel.h"

namespace qlora {
namespace {

using at::Tensor;

// What is added to a product [M, J] before it is rounded: the sum of the adapters' products, which `compute` makes for
// some columns, and the bias.
class Addend {
 public:
  Addend(const Tensor& bias, LowRankList added, int64_t M, int64_t J, const at::TensorOptions& options) {
    if (bias.defined()) values_ = kept_.emplace_back(bias.to(at::kFloat).contiguous()).const_data_ptr<float>();
    if (added.empty()) return;
    float* const sums = kept_.emplace_back(at::empty({M, J}, options.dtype(at::kFloat))).data_ptr<float>();
    for (const LowRank& one : added) {
      const bool as_it_lies = one.factor.stride(1) == 1 && one.factor.size(0) > 1;
      const Tensor& factor = kept_.emplace_back((as_it_lies ? one.factor : one.factor.t()).contiguous());
      products_.push_back({.x = cpu_rows(one.x),
                           .b = cpu_rows(factor),
                           .b_as_it_lies = as_it_lies,
                           .compute = DType::Float32,
                           .scale = static_cast<float>(one.scale),
                           .addend = values_,
                           .addend_stride = stride_,
                           .out = sums,
                           .dtype = DType::Float32,
                           .M = M,
                           .N = J,
                           .K = one.x.size(1)});
      values_ = sums, stride_ = J;
    }
  }

  const float* values() const { return values_; }
  int64_t stride() const { return stride_; }

  void compute(int64_t begin, int64_t end) const {
    for (const cpu::RowProducts& each : products_) cpu::row_products(each, begin, end);
  }

 private:
  std::vector<Tensor> kept_;  // until they are used
  std::vector<cpu::RowProducts> products_;
  const float* values_ = nullptr;
  int64_t stride_ = 0;
};

// Calls multiply(begin, end) for all columns of [M, J], by `tile` of them, of which each takes R multiply-adds.
template <typename Multiply>
void each_part(int64_t J, int64_t tile, int64_t R, const Addend& addend, const Multiply& multiply) {
  parallel_for(0, ceil_div(J, tile), ceil_div(kGrain, tile * std::max<int64_t>(R, 1)),
               [&](int64_t first, int64_t last) {
                 const int64_t begin = first * tile, end = std::min(last * tile, J);
                 addend.compute(begin, end);
                 multiply(begin, end);
               });
}

}  // namespace

cpu::Rows cpu_rows(const Tensor& m, const Tensor& mask) {
  return {m.const_data_ptr(), dtype_of(m.scalar_type()), m.stride(0),
          mask.defined() ? mask.const_data_ptr<bool>() : nullptr, mask.defined() ? mask.stride(0) : 0};
}

void linear_4bit_few_rows(const Tensor& x_arg, const Packed4bit& w, const Tensor& bias, LowRankList added,
                          const Tensor& y) {
  const Tensor x = x_arg.contiguous();
  const int64_t M = x.size(0), K = x.size(1), N = y.size(1);
  const DType dtype = dtype_of(x.scalar_type());
  const Tensor arranged = at::empty({cpu::arranged_bytes(dtype, M, N, K)}, x.options().dtype(at::kByte));
  cpu::arrange_x(x.const_data_ptr(), dtype, M, N, K, arranged.data_ptr());
  const Addend addend(bias, added, M, N, x.options());
  const cpu::FewRows product{.x = arranged.const_data_ptr(),
                             .w = w,
                             .addend = addend.values(),
                             .addend_stride = addend.stride(),
                             .y = y.data_ptr(),
                             .M = M,
                             .N = N,
                             .K = K,
                             .dtype = dtype};
  each_part(N, cpu::kFewRowsBoundary, K, addend,
            [&](int64_t begin, int64_t end) { cpu::linear_4bit(product, begin, end); });
}

void linear_4bit_dgrad_few_rows(const Tensor& grad, const Packed4bit& w, LowRankList added, const Tensor& grad_x) {
  const int64_t M = grad.size(0), N = grad.size(1), K = grad_x.size(1);
  const bool in_fp32 = cpu::dtype_of_grad(dtype_of(grad.scalar_type())) == DType::Float32;
  const Tensor converted = in_fp32 ? grad.to(at::kFloat) : N % 2 == 0 ? grad : at::constant_pad_nd(grad, {0, 1});
  const Tensor multiplied = converted.contiguous();
  const Addend addend({}, added, M, K, grad.options());
  const cpu::FewRowsDgrad product{.grad = multiplied.const_data_ptr(),
                                  .grad_stride = multiplied.size(1),
                                  .w = w,
                                  .addend = addend.values(),
                                  .grad_x = grad_x.data_ptr(),
                                  .M = M,
                                  .N = N,
                                  .K = K,
                                  .dtype = dtype_of(grad_x.scalar_type())};
  each_part(K, cpu::kDgradBoundary, N, addend,
            [&](int64_t begin, int64_t end) { cpu::linear_4bit_dgrad(product, begin, end); });
}

}  // namespace qlora
