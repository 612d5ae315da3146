// row_products for AVX2 and FMA.
#include "row_products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "row_products_loops.h"
#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

struct Avx2 : Avx2Vectors {
  static constexpr int kPerStep = 1, kRows = 4;

  using Mask = __m256;  // all bits of a lane

  static Mask mask(const bool* from, std::int64_t count = kLanes) {
    std::uint8_t bytes[kLanes] = {};
    __builtin_memcpy(bytes, from, static_cast<std::size_t>(count));
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(eight), _mm256_setzero_si256()));
  }
  static Vector keep(Vector x, Mask mask) { return _mm256_and_ps(x, mask); }

  static Vector product(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
};

}  // namespace

void row_products_avx2(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Avx2>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
