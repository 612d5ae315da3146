// AdamW (Loshchilov and Hutter, arXiv 1711.05101) as torch.optim.AdamW defines it, over slices of parameters: what the
// kernels of every device take. All arithmetic is fp32, in one sequence of roundings, so that the bytes do not depend
// on the device, the path, the threads or how the parameters are cut into slices, but for which NaN a NaN is.
//
//   p *= 1 - lr * weight_decay
//   m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
#pragma once

#include <cmath>
#include <cstdint>

#include "codec.h"
#include "random.h"

namespace qlora {

// Elements that share one absmax of 8-bit states; the kernels' unit of work.
constexpr std::int64_t kAdamwBlock = 256;
static_assert(kAdamwBlock == kRandomBlock);

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
  std::int64_t first;        // the index of its first element in the parameter, a multiple of 256
  std::uint64_t index;       // the parameter's and its shard's, for stochastic rounding
  void* exp_avg;             // float[count]; 8-bit: uint8_t[count], codes of kDynamicCodebook
  void* exp_avg_sq;          // likewise, of kUnsignedCodebook
  float* exp_avg_absmax;     // 8-bit: [ceil(count / 256)], what the codes of a block are multiplied by
  float* exp_avg_sq_absmax;  // likewise; both null: 32-bit
  const AdamwHyper* hyper;
};

// What all slices of a call share. The pointers are to memory of the device that computes.
struct AdamwOptions {
  const float* grad_scale = nullptr;  // what the gradients are divided by; null: nothing
  const float* found_inf = nullptr;   // if it is not 0, nothing is written; null: 0
  bool stochastic_rounding = false;   // of bf16 parameters, by (seed, step, index of parameter, index of element)
  std::uint64_t seed = 0;
};

// The number of blocks of 256 elements of a slice (the last may be shorter), and in all slices.
inline std::int64_t adamw_blocks(const AdamwSlice& slice) { return ceil_div(slice.count, kAdamwBlock); }
inline std::int64_t adamw_blocks(const AdamwSlice* slices, std::int64_t n) {
  std::int64_t blocks = 0;
  for (std::int64_t i = 0; i < n; ++i) blocks += adamw_blocks(slices[i]);
  return blocks;
}

// --- what the kernels compute with --------------------------------------------------------------------------------

// The bias correction of v is in step_size and eps: step_size * m / (sqrt(v) + eps).
struct AdamwFactors {
  float gradient;  // -1: maximize; the caller multiplies it by 1 / grad_scale
  float decay;
  float beta2, square;  // of v and g^2
  float average;        // m = base + average * (g - m), where base is m or, if m counts less than half, g
  bool from_gradient;   // it is g
  float step_size, eps;
};

inline AdamwFactors adamw_factors(const AdamwHyper& h) {
  const double step = static_cast<double>(h.step);
  const double correction1 = 1 - std::pow(h.beta1, step), correction2 = std::sqrt(1 - std::pow(h.beta2, step));
  const auto average = static_cast<float>(1 - h.beta1), eps = static_cast<float>(h.eps * correction2);
  const bool from_gradient = average >= 0.5f;
  return {.gradient = h.maximize ? -1.0f : 1.0f,
          .decay = static_cast<float>(1 - h.lr * h.weight_decay),
          .beta2 = static_cast<float>(h.beta2),
          .square = static_cast<float>(1 - h.beta2),
          .average = from_gradient ? average - 1.0f : average,
          .from_gradient = from_gradient,
          .step_size = static_cast<float>(h.lr / correction1 * correction2),
          // Of an eps that is not 0 a normal number, which nothing flushes to 0: without a gradient, that makes 0 / 0.
          .eps = eps >= 0x1p-126f || h.eps == 0 ? eps : 0x1p-126f};
}

// --- stochastic rounding: no state, only counters ------------------------------------------------------------------

inline std::uint64_t adamw_key(const AdamwSlice& slice, std::uint64_t seed) {
  return mix(mix(mix(seed) ^ static_cast<std::uint64_t>(slice.hyper->step)) ^ slice.index);
}

// 16 random bits of an element of a block, whose index is that in the parameter.
QLORA_HOST_DEVICE inline std::uint32_t random16(std::uint64_t block_key, std::uint32_t i) {
  return random32(block_key, i) >> 16;
}

// fp32 -> bf16, up with the probability of the part that is cut off; exact values, Inf and NaN as to nearest.
QLORA_HOST_DEVICE inline BFloat16 round_stochastically(float x, std::uint32_t random) {
  if (x != x) return {0x7fc0};
  return {static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(x) + random) >> 16)};
}

}  // namespace qlora
