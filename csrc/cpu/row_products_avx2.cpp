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

struct Avx2 {
  static constexpr int kLanes = 8;
  using Vector = __m256;

  static Vector splat(float x) { return _mm256_set1_ps(x); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  template <typename T>
  static void store(T* to, Vector x) {
    store8(to, x);
  }

  template <typename T>
  static Vector load(const T* from) {
    return load8(from);
  }

  template <typename T>
  static Vector load(const T* from, std::int64_t count) {
    T values[kLanes] = {};
    for (std::int64_t i = 0; i < count; ++i) values[i] = from[i];
    return load8(values);
  }

  // Within halves of 4 lanes, then the halves.
  static void transpose(Vector (&x)[kLanes]) {
    Vector halves[4][2];  // [j][i]: the j-th of 4 lanes, of both halves, of rows 4 i to 4 i + 3
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vector* row = x + 4 * i;
      const __m256d low[2] = {low_pairs(row), low_pairs(row + 2)};
      const __m256d high[2] = {high_pairs(row), high_pairs(row + 2)};
      halves[0][i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low[0], low[1]));
      halves[1][i] = _mm256_castpd_ps(_mm256_unpackhi_pd(low[0], low[1]));
      halves[2][i] = _mm256_castpd_ps(_mm256_unpacklo_pd(high[0], high[1]));
      halves[3][i] = _mm256_castpd_ps(_mm256_unpackhi_pd(high[0], high[1]));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      x[j] = _mm256_permute2f128_ps(halves[j][0], halves[j][1], 0x20);
      x[4 + j] = _mm256_permute2f128_ps(halves[j][0], halves[j][1], 0x31);
    }
  }

 private:
  static __m256d low_pairs(const Vector* x) { return _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1])); }
  static __m256d high_pairs(const Vector* x) { return _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1])); }
};

}  // namespace

void row_products_avx2(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Avx2>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
