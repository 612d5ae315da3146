// linear_4bit_dgrad for few rows: the choice of its kernel.
#include "linear_4bit_dgrad.h"

#include <stdexcept>

#include "path.h"

namespace qlora::cpu {
namespace {

bool in_bf16(DType dtype) { return path() == Path::Avx512Bf16 && dtype == DType::BFloat16; }

}  // namespace

std::int64_t most_few_rows_of_grad(DType dtype) {
  if (path() < Path::Avx512) return 0;
  return in_bf16(dtype) ? 12 : 6;
}

void linear_4bit_dgrad(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  if (product.M < 1 || product.M > most_few_rows_of_grad(product.dtype))
    throw std::logic_error("linear_4bit_dgrad: no kernel for so many rows on this CPU path");
  if (begin % kDgradBoundary != 0 || (end % kDgradBoundary != 0 && end != product.K))
    throw std::logic_error("linear_4bit_dgrad: columns must be cut at multiples of kDgradBoundary");
#if defined(__x86_64__)
  (in_bf16(product.dtype) ? linear_4bit_dgrad_avx512_bf16 : linear_4bit_dgrad_avx512)(product, begin, end);
#endif
}

}  // namespace qlora::cpu
