// linear_4bit for few rows of x: weights are decoded in registers, and multiplied there.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../codec.h"
#include "caches.h"

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

// The most rows of x (of this dtype, on the CPU path in use) that are multiplied here; beyond, matmul or torch is
// faster.
std::int64_t most_few_rows(DType dtype);

// x[M, K] in the type that is multiplied and in the order that the kernel decodes weights in: arranged_bytes of it, on
// a 64-byte boundary.
std::int64_t arranged_bytes(DType dtype, std::int64_t M, std::int64_t N, std::int64_t K);
void arrange_x(const void* x, DType dtype, std::int64_t M, std::int64_t N, std::int64_t K, void* arranged);

// Rows [begin, end) of W, in any ranges; where they begin and end at multiples of this, no kernel shares rows between
// two ranges.
constexpr std::int64_t kFewRowsBoundary = 16;
void linear_4bit(const FewRows& product, std::int64_t begin, std::int64_t end);

// --- the kernels --------------------------------------------------------------------------------------------------

// Calls body(begin, rows) for groups of the rows of x, of as many as `most` at most and of half as many at least (or of
// all).
template <typename Body>
void each_group(std::int64_t M, std::int64_t most, Body&& body) {
  const std::int64_t groups = ceil_div(M, most);
  for (std::int64_t i = 0; i < groups; ++i) {
    const std::int64_t begin = M * i / groups, end = M * (i + 1) / groups;
    body(begin, end - begin);
  }
}

// x comes to a kernel in groups of rows, each padded with zeros to whole chunks and in the order that it wants.
struct FewRowsKernel {
  std::int64_t chunk;  // elements of a row
  std::int64_t bytes;  // of an element of x as it is multiplied
  std::int64_t most_at_once;
  void (*arrange)(const void* x, DType dtype, std::int64_t rows, std::int64_t K, void* arranged);  // a group
  void (*multiply)(const FewRows& product, std::int64_t begin, std::int64_t end);                  // all groups
};

extern const FewRowsKernel few_rows_portable;
const FewRowsKernel& few_rows_avx2(DType dtype);                       // of x
const FewRowsKernel& few_rows_avx512(std::int64_t M, std::int64_t N);  // rows of x in all, and of W
const FewRowsKernel& few_rows_avx512_bf16(std::int64_t M, std::int64_t N);
const FewRowsKernel& few_rows_amx(std::int64_t M, std::int64_t N);

}  // namespace qlora::cpu
