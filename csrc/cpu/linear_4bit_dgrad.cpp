// linear_4bit_dgrad for few rows: the choice of its kernel.
#include "linear_4bit_dgrad.h"

#include <stdexcept>

#include "path.h"

namespace qlora::cpu {

std::int64_t most_few_rows_of_grad(DType dtype, std::int64_t K) {
  switch (path()) {
    case Path::Portable:
      return 0;
    case Path::Avx2:
      return 16;
    case Path::Avx512:
      return 6;
    case Path::Avx512Bf16:
      if (dtype != DType::BFloat16) return 6;
      return K % kDgradBoundary == 0 ? 32 : 8;
    case Path::Amx:
      return dtype == DType::BFloat16 ? 2 : 6;
  }
  throw std::logic_error("linear_4bit_dgrad: unknown CPU path");
}

DType dtype_of_grad(DType dtype) {
  return dtype == DType::BFloat16 && path() >= Path::Avx512Bf16 ? dtype : DType::Float32;
}

void linear_4bit_dgrad(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  if (product.M < 1 || product.M > most_few_rows_of_grad(product.dtype, product.K))
    throw std::logic_error("linear_4bit_dgrad: no kernel for so many rows on this CPU path");
  if (begin % kDgradBoundary != 0 || (end % kDgradBoundary != 0 && end != product.K))
    throw std::logic_error("linear_4bit_dgrad: columns must be cut at multiples of kDgradBoundary");
#if defined(__x86_64__)
  if (dtype_of_grad(product.dtype) == DType::BFloat16) return linear_4bit_dgrad_avx512_bf16(product, begin, end);
  (path() == Path::Avx2 ? linear_4bit_dgrad_avx2 : linear_4bit_dgrad_avx512)(product, begin, end);
#endif
}

}  // namespace qlora::cpu
