// What the two kinds of row_products share on AVX512. A file of kernels includes this inside its target region.
#include "row_products_loops.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512Vectors {
  static constexpr int kLanes = 16, kRows = 8;
  using Vector = __m512;

  static Vector splat(float x) { return _mm512_set1_ps(x); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }

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
}  // namespace qlora::cpu
