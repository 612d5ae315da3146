// AdamW (Loshchilov and Hutter, arXiv 1711.05101) as torch.optim.AdamW defines it, over slices of parameters: what the
// kernels of every device take. All arithmetic is fp32, in one sequence of roundings, so that the bytes do not depend
// on the device, the path, the threads or how the parameters are cut into slices.
//
//   p *= 1 - lr * weight_decay
//   m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
#pragma once

#include <cstdint>

#include "dtype.h"

namespace qlora {

// Elements that share one absmax of 8-bit states; the kernels' unit of work.
constexpr std::int64_t kAdamwBlock = 256;

// Of a parameter group at a step. All are double, as torch computes with them before it rounds to fp32.
struct AdamwHyper {
  double lr, beta1, beta2, eps, weight_decay;
  std::int64_t step;  // the number of this update, from 1
  bool maximize;
};

// A run of elements of one parameter, with their gradients and states.
struct AdamwSlice {
  void* param;       // [count]
  const void* grad;  // [count]
  DType param_dtype, grad_dtype;
  std::int64_t count;
  std::int64_t first;                         // the index of its first element in the parameter, a multiple of 256
  std::uint64_t index;                        // of the parameter, for stochastic rounding
  void *exp_avg, *exp_avg_sq;                 // float[count]; 8-bit: uint8_t[count], codes
  float *exp_avg_absmax, *exp_avg_sq_absmax;  // 8-bit: [ceil(count / 256)]; both null: 32-bit
  const AdamwHyper* hyper;
};

// What all slices of a call share. The pointers are to memory of the device that computes.
struct AdamwOptions {
  const float* grad_scale = nullptr;  // what the gradients are divided by; null: nothing
  const float* found_inf = nullptr;   // if it is not 0, nothing is written; null: 0
  bool stochastic_rounding =
      false;  // of bf16 parameters; by (seed, step, index of the parameter, index of the element)
  std::uint64_t seed = 0;
};

// The number of blocks of 256 elements in all slices; each slice's last block may be shorter.
inline std::int64_t adamw_blocks(const AdamwSlice* slices, std::int64_t n) {
  std::int64_t blocks = 0;
  for (std::int64_t i = 0; i < n; ++i) blocks += (slices[i].count + kAdamwBlock - 1) / kAdamwBlock;
  return blocks;
}

namespace cpu {

// Blocks [begin, end) of the n slices, counted through all of them. Holds no threads: the caller splits
// [0, adamw_blocks) as it likes.
void adamw(const AdamwSlice* slices, std::int64_t n, const AdamwOptions& options, std::int64_t begin, std::int64_t end);

}  // namespace cpu
}  // namespace qlora
