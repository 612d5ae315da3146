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

  static void transpose(Vector (&x)[kLanes]) { cpu::transpose(x); }
};

}  // namespace

void row_products_avx512(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Avx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
