// matmul: the choice of its kernel, and its memory.
#include "matmul.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "matmul_blocks.h"
#include "path.h"

namespace qlora::cpu {
namespace {

// Null where torch's is faster.
const MatmulKernel* find_kernel(DType compute) {
  if (compute == DType::BFloat16 && torch_has_bf16_matrices()) return nullptr;
#if defined(__x86_64__)
  switch (path()) {
    case Path::Portable:
      break;
    case Path::Avx2:
      return &matmul_avx2;
    case Path::Amx:
      if (compute == DType::BFloat16) return &matmul_amx;
      return &matmul_avx512;
    case Path::Avx512Bf16:
      if (compute == DType::BFloat16) return &matmul_avx512_bf16;
      [[fallthrough]];
    case Path::Avx512:
      return &matmul_avx512;
  }
#endif
#ifdef QLORA_EXT_PORTABLE_MATMUL
  return &matmul_portable;
#else
  return nullptr;
#endif
}

const MatmulKernel& kernel_for(const Matmul& product) {
  const MatmulKernel* kernel = find_kernel(product.compute);
  if (kernel == nullptr) throw std::logic_error("matmul: no kernel that computes in this dtype on this CPU path");
  return *kernel;
}

std::int64_t rows_in_tiles(const MatmulKernel& kernel, std::int64_t rows) {
  return ceil_div(rows, kernel.row_step) * kernel.row_step;
}

void check_rows(const MatmulKernel& kernel, const MatmulRows& rows, std::int64_t begin, std::int64_t end) {
  const auto is_boundary = [&](std::int64_t row) {
    return row == rows.end || (row - rows.begin) % kernel.row_boundary == 0;
  };
  if (begin < rows.begin || end > rows.end || !is_boundary(begin) || !is_boundary(end)) {
    throw std::logic_error("matmul: rows must be cut at multiples of row_boundary");
  }
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

bool has_matmul(DType compute) { return find_kernel(compute) != nullptr; }

std::int64_t arranged_floats(const Matmul& product, std::int64_t rows) {
  const MatmulKernel& kernel = kernel_for(product);
  std::int64_t floats = 0;
  for (int t = 0; t < product.num_terms; ++t) {
    floats += ceil_div(product.terms[t].R, kernel.per_step * kernel.depth_step) * kernel.depth_step;
  }
  return rows_in_tiles(kernel, rows) * floats;
}

std::int64_t row_boundary(const Matmul& product) { return kernel_for(product).row_boundary; }

std::int64_t most_matmul_rows(const Matmul& product) {
  // Read again for each panel, they should lie in the last-level cache; but a weight must not be decoded for few rows.
  constexpr std::int64_t kMostFloats = 4 << 20;
  constexpr std::int64_t kLeastRows = 120;
  const MatmulKernel& kernel = kernel_for(product);
  const std::int64_t rows = kMostFloats * kernel.row_step / std::max<std::int64_t>(arranged_floats(product, 1), 1);
  return std::clamp(rows, kLeastRows, kMaxRows) / kernel.row_boundary * kernel.row_boundary;
}

std::int64_t matmul_columns_at_once(const Matmul& product, std::int64_t rows) {
  return columns_at_once(rows_in_tiles(kernel_for(product), rows));
}

void arrange_rows(const Matmul& product, const MatmulRows& rows, std::int64_t begin, std::int64_t end) {
  const MatmulKernel& kernel = kernel_for(product);
  check_rows(kernel, rows, begin, end);
  kernel.arrange(product, rows, begin, end);
}

void matmul(const Matmul& product, const MatmulRows& rows, const Rectangle& rectangle) {
  const MatmulKernel& kernel = kernel_for(product);
  check_rows(kernel, rows, rectangle.row_begin, rectangle.row_end);
  const auto is_boundary = [&](std::int64_t column) {
    return column % kMatmulColumnBoundary == 0 || column == product.J;
  };
  if (!is_boundary(rectangle.column_begin) || !is_boundary(rectangle.column_end)) {
    throw std::logic_error("matmul: columns must be cut at multiples of kMatmulColumnBoundary");
  }
  if (rectangle.row_end - rectangle.row_begin > kMaxRows) throw std::logic_error("matmul: more than kMaxRows rows");
  constexpr std::size_t kAlignment = 64;
  constexpr std::size_t kBytes = MatmulScratch::kFloats * sizeof(float);
  static_assert(kBytes % kAlignment == 0);
  const std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(kAlignment, kBytes)));
  if (memory == nullptr) throw std::bad_alloc();
  kernel.multiply(product, rows, rectangle, MatmulScratch(memory.get()));
}

}  // namespace qlora::cpu
