// linear_4bit for few rows: the choice of its kernel, and x in that kernel's order.
#include "linear_4bit.h"

#include <algorithm>
#include <stdexcept>

#include "path.h"

namespace qlora::cpu {
namespace {

struct Kernel {
  Arrangement (*arrangement)();
  void (*multiply)(const FewRows&, std::int64_t, std::int64_t);
};

// For x of this dtype. Nulls where there is none.
Kernel kernel_for([[maybe_unused]] DType dtype) {
#if defined(__x86_64__)
  switch (path()) {
    case Path::Portable:
      break;
    case Path::Avx2:
      return {arrangement_avx2, linear_4bit_avx2};
    case Path::Avx512Bf16:
      if (dtype == DType::BFloat16) return {arrangement_avx512_bf16, linear_4bit_avx512_bf16};
      [[fallthrough]];
    case Path::Avx512:
      return {arrangement_avx512, linear_4bit_avx512};
  }
#endif
  return {};
}

std::int64_t padded(const Arrangement& a, std::int64_t K) { return (K + a.chunk - 1) / a.chunk * a.chunk; }

}  // namespace

bool has_few_rows(DType dtype) { return kernel_for(dtype).multiply != nullptr; }

std::int64_t arranged_bytes(DType dtype, std::int64_t M, std::int64_t K) {
  const Arrangement a = kernel_for(dtype).arrangement();
  return M * padded(a, K) * itemsize(a.dtype);
}

void arrange_x(const void* x, DType dtype, std::int64_t M, std::int64_t K, void* arranged) {
  const Arrangement a = kernel_for(dtype).arrangement();
  const std::int64_t stride = padded(a, K);
  with_type(dtype, [&](auto from_type) {
    with_type(a.dtype, [&](auto to_type) {
      using To = decltype(to_type);
      for (std::int64_t m = 0; m < M; ++m) {
        const auto* from = static_cast<const decltype(from_type)*>(x) + m * K;
        To* to = static_cast<To*>(arranged) + m * stride;
        for (std::int64_t k = 0; k < stride; k += a.chunk, to += a.chunk) {
          for (std::int64_t i = 0; i < a.chunk; ++i) {
            const std::int64_t at = k + a.order[i];
            to[i] = round_to<To>(at < K ? to_float(from[at]) : 0.0f);
          }
        }
      }
    });
  });
}

void linear_4bit(const FewRows& product, std::int64_t begin, std::int64_t end) {
  const Kernel chosen = kernel_for(product.dtype);
  if (chosen.multiply == nullptr || product.M < 1 || product.M > kMostFewRows) {
    throw std::logic_error("linear_4bit: no kernel for so many rows on this CPU path");
  }
  chosen.multiply(product, begin, end);
}

}  // namespace qlora::cpu
