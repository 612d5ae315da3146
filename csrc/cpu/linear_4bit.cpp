// linear_4bit for few rows: the choice of its kernel, and x as it wants that.
#include "linear_4bit.h"

#include <stdexcept>

#include "path.h"
#include "row_products.h"

namespace qlora::cpu {
namespace {

// For M rows of x of this dtype, and N of W.
const FewRowsKernel& kernel_for([[maybe_unused]] DType dtype, [[maybe_unused]] std::int64_t M,
                                [[maybe_unused]] std::int64_t N) {
#if defined(__x86_64__)
  switch (path()) {
    case Path::Portable:
      break;
    case Path::Avx2:
      return few_rows_avx2(dtype);
    case Path::Amx:
      if (dtype == DType::BFloat16) return few_rows_amx(M, N);
      return few_rows_avx512(M, N);
    case Path::Avx512Bf16:
      if (dtype == DType::BFloat16) return few_rows_avx512_bf16(M, N);
      [[fallthrough]];
    case Path::Avx512:
      return few_rows_avx512(M, N);
  }
#endif
  return few_rows_portable;
}

std::int64_t arranged_row_bytes(const FewRowsKernel& kernel, std::int64_t K) {
  return ceil_div(K, kernel.chunk) * kernel.chunk * kernel.bytes;
}

}  // namespace

std::int64_t most_few_rows(DType dtype) {
  if (dtype == DType::BFloat16 && torch_has_bf16_matrices()) return 8;
  return path() < Path::Avx512 ? 8 : kMostRowProducts;  // row_products, which adds the adapters, takes no more
}

std::int64_t arranged_bytes(DType dtype, std::int64_t M, std::int64_t N, std::int64_t K) {
  return M * arranged_row_bytes(kernel_for(dtype, M, N), K);
}

void arrange_x(const void* x, DType dtype, std::int64_t M, std::int64_t N, std::int64_t K, void* arranged) {
  const FewRowsKernel& kernel = kernel_for(dtype, M, N);
  const std::int64_t row_bytes = arranged_row_bytes(kernel, K);
  each_group(M, kernel.most_at_once, [&](std::int64_t m, std::int64_t rows) {
    kernel.arrange(static_cast<const char*>(x) + m * K * itemsize(dtype), dtype, rows, K,
                   static_cast<char*>(arranged) + m * row_bytes);
  });
}

void linear_4bit(const FewRows& product, std::int64_t begin, std::int64_t end) {
  if (product.M < 1 || product.M > most_few_rows(product.dtype))
    throw std::logic_error("linear_4bit: no kernel for so many rows on this CPU path");
  kernel_for(product.dtype, product.M, product.N).multiply(product, begin, end);
}

}  // namespace qlora::cpu
