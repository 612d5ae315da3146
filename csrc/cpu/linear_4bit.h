// linear_4bit for few rows of x: weights are decoded in registers, and multiplied there.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

// y[M, N] = x[M, K] @ W[N, K]^T + addend; rows of W are whole blocks.
struct FewRows {
  const void* x;  // as arrange_x leaves it
  Packed4bit w;
  const float* addend;         // or null
  std::int64_t addend_stride;  // N: it is [M, N]; 0: it is [N], the same for every row
  void* y;
  std::int64_t M, N, K;
  DType dtype;  // of y, and of x before arrange_x
};

// As many rows are multiplied here; of more, matmul or, with AMX, torch is faster: for x of this dtype, on the CPU path
// in use. 0: it has no such kernel.
std::int64_t most_few_rows(DType dtype);

// x[M, K] in the type that is multiplied and in the order that the kernel decodes weights in: arranged_bytes of it, on
// a 64-byte border.
std::int64_t arranged_bytes(DType dtype, std::int64_t M, std::int64_t K);
void arrange_x(const void* x, DType dtype, std::int64_t M, std::int64_t K, void* arranged);

// Rows [begin, end) of W.
void linear_4bit(const FewRows& product, std::int64_t begin, std::int64_t end);

// --- the vector kernels -------------------------------------------------------------------------------------------

constexpr std::int64_t kMostChunk = 256;
constexpr int kMostAtOnce = 4;  // rows that a kernel multiplies

std::int64_t l1_bytes();  // of this machine's cache

// How a kernel wants x: chunk by chunk, of each all rows, element order[i] of a row's chunk at place i.
struct Arrangement {
  std::int64_t chunk;  // elements; x is padded with zeros to whole chunks
  DType dtype;
  std::uint8_t order[kMostChunk];
};

const Arrangement& arrangement_avx2();
const Arrangement& arrangement_avx512();
const Arrangement& arrangement_avx512_bf16();
void linear_4bit_avx2(const FewRows& product, std::int64_t begin, std::int64_t end);
void linear_4bit_avx512(const FewRows& product, std::int64_t begin, std::int64_t end);
void linear_4bit_avx512_bf16(const FewRows& product, std::int64_t begin, std::int64_t end);

}  // namespace qlora::cpu
