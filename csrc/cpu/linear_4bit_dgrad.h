// linear_4bit_dgrad for few rows of grad: weights are decoded to registers, or to the L1, and multiplied there.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

// grad_x[M, K] = grad[M, N] @ W[N, K] + addend; rows of W are whole blocks.
struct FewRowsDgrad {
  const void* grad;  // of dtype_of_grad; in bf16, a zero stands after each row of an odd N
  std::int64_t grad_stride;
  Packed4bit w;
  const float* addend;  // [M, K] or null
  void* grad_x;
  std::int64_t M, N, K;
  DType dtype;  // of grad_x
};

// The most rows of grad (of this dtype, on the CPU path in use) that are multiplied here; beyond, matmul or torch
// is as fast, at least where threads cannot share the K columns evenly. 0: no such kernel.
std::int64_t most_few_rows_of_grad(DType dtype, std::int64_t K);

// The dtype in which grad is multiplied.
DType dtype_of_grad(DType dtype);

// Columns [begin, end) of W, in any ranges that begin at multiples of this.
constexpr std::int64_t kDgradBoundary = 128;
void linear_4bit_dgrad(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end);

void linear_4bit_dgrad_avx2(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end);
void linear_4bit_dgrad_avx512(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end);
void linear_4bit_dgrad_avx512_bf16(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end);

}  // namespace qlora::cpu
