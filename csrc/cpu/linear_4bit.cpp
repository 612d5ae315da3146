// linear_4bit for few rows: the choice of its kernel, and x in that kernel's order.
#include "linear_4bit.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "path.h"

namespace qlora::cpu {
namespace {

struct Kernel {
  const Arrangement& (*arrangement)();
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

// Rows are multiplied in groups of about the same size, of as many as a kernel has sums for.
std::int64_t group_size(std::int64_t M) {
  const std::int64_t groups = (M + kMostAtOnce - 1) / kMostAtOnce;
  return (M + groups - 1) / groups;
}

template <typename From, typename To>
void arrange_group(const From* x, std::int64_t rows, std::int64_t K, const Arrangement& a, To* arranged) {
  for (std::int64_t m = 0; m < rows; ++m, x += K) {
    To* to = arranged + m * a.chunk;
    for (std::int64_t k = 0; k < K; k += a.chunk, to += rows * a.chunk) {
      To chunk[kMostChunk] = {};
      for (std::int64_t i = 0; i < std::min(a.chunk, K - k); ++i) {
        if constexpr (std::is_same_v<From, To>) {
          chunk[i] = x[k + i];  // nothing to round
        } else {
          chunk[i] = round_to<To>(to_float(x[k + i]));
        }
      }
      for (std::int64_t i = 0; i < a.chunk; ++i) to[i] = chunk[a.order[i]];
    }
  }
}

}  // namespace

std::int64_t l1_bytes() {
  static const std::int64_t bytes = [] {
    std::int64_t l1 = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return std::max<std::int64_t>(l1, 32 << 10);
  }();
  return bytes;
}

std::int64_t most_few_rows(DType dtype) {
  if (kernel_for(dtype).multiply == nullptr) return 0;
  return dtype == DType::BFloat16 && multiplies_matrices() ? 8 : 16;
}

std::int64_t arranged_bytes(DType dtype, std::int64_t M, std::int64_t K) {
  const Arrangement& a = kernel_for(dtype).arrangement();
  return M * padded(a, K) * itemsize(a.dtype);
}

void arrange_x(const void* x, DType dtype, std::int64_t M, std::int64_t K, void* arranged) {
  const Arrangement& a = kernel_for(dtype).arrangement();
  const std::int64_t group = group_size(M);
  with_type(dtype, [&](auto from_type) {
    with_type(a.dtype, [&](auto to_type) {
      for (std::int64_t m = 0; m < M; m += group) {
        arrange_group(static_cast<const decltype(from_type)*>(x) + m * K, std::min(group, M - m), K, a,
                      static_cast<decltype(to_type)*>(arranged) + m * padded(a, K));
      }
    });
  });
}

void linear_4bit(const FewRows& product, std::int64_t begin, std::int64_t end) {
  const Kernel chosen = kernel_for(product.dtype);
  const auto [x, w, addend, addend_stride, y, M, N, K, dtype] = product;
  if (M < 1 || M > most_few_rows(dtype))
    throw std::logic_error("linear_4bit: no kernel for so many rows on this CPU path");
  const std::int64_t group = group_size(M);
  const std::int64_t x_row = arranged_bytes(dtype, 1, K), y_row = N * itemsize(dtype);
  const std::int64_t rows_of_w = M > group ? 64 : end - begin;  // the next group finds them in the L2
  for (std::int64_t n = begin; n < end; n += rows_of_w) {
    for (std::int64_t m = 0; m < M; m += group) {
      FewRows part = product;
      part.x = static_cast<const char*>(x) + m * x_row;
      part.addend = addend == nullptr ? nullptr : addend + m * addend_stride;
      part.y = static_cast<char*>(y) + m * y_row;
      part.M = std::min(group, M - m);
      chosen.multiply(part, n, std::min(n + rows_of_w, end));
    }
  }
}

}  // namespace qlora::cpu
