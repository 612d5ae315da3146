// The products of few rows with the matrices of adapters, or of adapters' few rows with many of x: b is multiplied as
// it lies in memory, where packing it into matmul's panels would take longer than the product.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

// A matrix with contiguous rows.
struct Rows {
  const void* values;
  DType dtype;
  std::int64_t stride;
  const bool* mask = nullptr;  // or where it is false the number counts as 0
  std::int64_t mask_stride = 0;
};

// out[M, N] = scale * x[M, K] @ b + addend, summed in fp32.
struct RowProducts {
  Rows x;  // without a mask
  Rows b;  // [K, N] if b_as_it_lies, else [N, K], whose transpose is multiplied
  bool b_as_it_lies;
  DType compute;  // Float32, or BFloat16 to multiply in pairs of bf16 where the CPU path has them
  float scale;
  const float* addend;         // or null; may be an fp32 out itself, at stride N
  std::int64_t addend_stride;  // N: it is [M, N]; 0: it is [N], the same for every row
  void* out;                   // [M, N], contiguous
  DType dtype;                 // of out
  std::int64_t M, N, K;
};

constexpr std::int64_t kMostRowProducts = 32;  // rows of x; more are matmul's

// Columns [begin, end) of out; each element gets the same roundings however they are cut. std::logic_error for more
// rows.
void row_products(const RowProducts& product, std::int64_t begin, std::int64_t end);

void row_products_portable(const RowProducts& product, std::int64_t begin, std::int64_t end);
void row_products_avx2(const RowProducts& product, std::int64_t begin, std::int64_t end);
void row_products_avx512(const RowProducts& product, std::int64_t begin, std::int64_t end);
void row_products_avx512_bf16(const RowProducts& product, std::int64_t begin, std::int64_t end);

}  // namespace qlora::cpu
