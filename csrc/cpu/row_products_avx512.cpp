// row_products for AVX512.
#include "row_products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "row_products_loops.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using Vector = __m512;

  static Vector splat(float x) { return _mm512_set1_ps(x); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  template <typename T>
  static void store(T* to, Vector x) {
    store16(to, x);
  }

  template <typename T>
  static Vector load(const T* from) {
    return load16(from);
  }

  template <typename T>
  static Vector load(const T* from, std::int64_t count) {
    T values[kLanes];
    const __m512i bytes = load_bytes(from, count * static_cast<std::int64_t>(sizeof(T)));
    __builtin_memcpy(values, &bytes, sizeof values);
    return load16(values);
  }

  // Within quarters of 4 lanes, then the quarters.
  static void transpose(Vector (&x)[kLanes]) {
    Vector quarters[4][4];  // [j][i]: the j-th of 4 lanes, of every quarter, of rows 4 i to 4 i + 3
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vector* row = x + 4 * i;
      const __m512d low[2] = {low_pairs(row), low_pairs(row + 2)};
      const __m512d high[2] = {high_pairs(row), high_pairs(row + 2)};
      quarters[0][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
      quarters[1][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
      quarters[2][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
      quarters[3][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vector(&of)[4] = quarters[j];
      const Vector even[2] = {_mm512_shuffle_f32x4(of[0], of[1], 0b10001000),
                              _mm512_shuffle_f32x4(of[2], of[3], 0b10001000)};
      const Vector odd[2] = {_mm512_shuffle_f32x4(of[0], of[1], 0b11011101),
                             _mm512_shuffle_f32x4(of[2], of[3], 0b11011101)};
      x[j] = _mm512_shuffle_f32x4(even[0], even[1], 0b10001000);
      x[8 + j] = _mm512_shuffle_f32x4(even[0], even[1], 0b11011101);
      x[4 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0b10001000);
      x[12 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0b11011101);
    }
  }

 private:
  static __m512d low_pairs(const Vector* x) { return _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1])); }
  static __m512d high_pairs(const Vector* x) { return _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1])); }
};

}  // namespace

void row_products_avx512(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Avx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
