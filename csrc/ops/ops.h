// What the files of ops share: arguments once they are checked, results, and the products.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "check.h"
#include "device.h"

namespace qlora {

// While it lives torch's functions, called by an op, compute as they are told: nothing is recorded, nor cast by
// autocast.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// x (or a gradient) as a matrix, and the 4-bit weight [N, K].
struct LinearArguments {
  int64_t N, K;
  Weight4bit w;
  at::Tensor rows;  // [M, K], or of a gradient [M, N]
};

LinearArguments check_linear(const char* op, const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax,
                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                             const std::string& quant_type, int64_t blocksize, int64_t out_features);
LinearArguments check_dgrad(const char* op, const at::Tensor& grad, const at::Tensor& packed, const at::Tensor& absmax,
                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                            const std::string& quant_type, int64_t blocksize, int64_t in_features);
// In the dtype of x; undefined if there is none.
at::Tensor check_bias(const char* op, const OptionalTensor& bias, const at::Tensor& x, int64_t N);

// Of adapters A [..., r, K].
inline int64_t total_rank(at::TensorList A) {
  int64_t total = 0;
  for (const at::Tensor& a : A) total += a.size(-2);
  return total;
}

// A result to be filled: at::empty, on the CPU in huge pages if large, as with torch's THP_MEM_ALLOC_ENABLE=1. The
// system needs longer to hand out that many small pages than most kernels need to fill them; not for a product, which
// is malloc's: where a virtual machine's host takes freed memory away, huge pages of it would take the longer.
at::Tensor new_result(at::IntArrayRef sizes, const at::TensorOptions& options);

// y = x @ W^T + bias + added: [M, N]; grad_x = grad @ W + added: [M, K].
void multiply(const at::Tensor& x, const Packed4bit& w, const at::Tensor& bias, LowRankList added, const at::Tensor& y);
void multiply_dgrad(const at::Tensor& grad, const Packed4bit& w, LowRankList added, const at::Tensor& grad_x);
// The same into a new tensor, rows in the place of x and grad.
at::Tensor multiply(const LinearArguments& arguments, const at::Tensor& bias, LowRankList added);
at::Tensor multiply_dgrad(const LinearArguments& arguments, LowRankList added);

// Which elements of x, of any dtype, dropout keeps, each with probability `keep`: a bool tensor, by the seed alone, the
// same on every device.
at::Tensor dropout_mask(const at::Tensor& x, double keep, const at::Tensor& seed);

// x[..., n] as [M, n] (its sizes may be symbols), and a matrix as the tensor whose leading dimensions are x's.
at::Tensor as_rows(const at::Tensor& x);
at::Tensor in_shape_of(const at::Tensor& rows, const at::Tensor& x);

// AdamW for whole tensors, in place. The lists of absmax are empty: states are fp32; else they are uint8, in blocks of
// 256. seed: of stochastic rounding; none: to nearest.
void adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                at::TensorList exp_avg_absmax, at::TensorList exp_avg_sq_absmax, const AdamwHyper& hyper,
                const OptionalTensor& grad_scale, const OptionalTensor& found_inf, std::optional<uint64_t> seed);

// The ops for a device's tensors, to be registered under its dispatch key: of lora.cpp, of experts.cpp, and all.
void register_lora_ops(torch::Library& m);
void register_expert_ops(torch::Library& m);
void register_ops(torch::Library& m);

}  // namespace qlora
