// The product of many rows with operands that are decoded on the fly: what linear_4bit, its gradient and the adapters
// compute on vector CPUs.
//
//   out[M, J] = round(sum over terms of x[M, R] @ b[R, J] + bias[J])
//
// Rows of x are arranged first; then any rectangle of out can be computed by itself. Each element gets the same
// roundings however out is cut.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

// A dense matrix of any strides; elements whose mask is false count as 0.
struct Matrix {
  const void* values;
  DType dtype;
  std::int64_t row_stride, column_stride;
  const bool* mask = nullptr;  // of the same strides, or null
};

// One product x[M, R] @ b[R, J].
struct Term {
  enum class Kind { Dense, Weight, WeightTransposed };

  std::int64_t R;
  Matrix x;
  Kind kind;
  Packed4bit w;  // Weight: b = W[R, J]; WeightTransposed: b = W^T of W[J, R]. Whole blocks in a row.
  Matrix dense;  // Dense: b = scale * dense
  float scale = 1.0f;
  const bool* out_mask = nullptr;  // [M, J] or null: where this term counts
};

struct Matmul {
  std::int64_t M, J;
  const Term* terms;
  int num_terms;
  const void* bias;  // [J] of out's dtype, or null
  void* out;         // [M, J], contiguous
  DType dtype;
  DType compute;  // Float32, or BFloat16 to multiply in pairs of bf16 where the CPU path has them
};

// Rows [begin, end) of a product, and their x of all terms as it is multiplied: arranged_floats of it.
struct MatmulRows {
  std::int64_t begin, end;
  float* x;
};

// Rows and columns of out. They must be cut at multiples of row_boundary, counted from MatmulRows::begin, and of
// kMatmulColumnBoundary.
struct Rectangle {
  std::int64_t row_begin, row_end, column_begin, column_end;
};

constexpr std::int64_t kMatmulColumnBoundary = 32;

// Whether there is a kernel that computes in this: torch's are faster for bf16 where torch_has_bf16_matrices, and on
// x86-64 without AVX2.
bool has_matmul(DType compute);

std::int64_t row_boundary(const Matmul& product);

// The most rows, a multiple of row_boundary, to be arranged at a time: a decoded weight is multiplied with all.
std::int64_t most_matmul_rows(const Matmul& product);
std::int64_t arranged_floats(const Matmul& product, std::int64_t rows);

// How many columns of a rectangle of so many rows are computed at a time: a multiple of kMatmulColumnBoundary.
std::int64_t matmul_columns_at_once(const Matmul& product, std::int64_t rows);

// First x of all of `rows`, in parts [begin, end), then any rectangles of them. std::logic_error if there is no kernel,
// or if they are not cut where they must be.
void arrange_rows(const Matmul& product, const MatmulRows& rows, std::int64_t begin, std::int64_t end);
void matmul(const Matmul& product, const MatmulRows& rows, const Rectangle& rectangle);

}  // namespace qlora::cpu
