// row_products for AVX512_BF16: pairs of bf16, multiplied two at a time.
#include "row_products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "row_products_loops.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 : Avx512Vectors {
  static constexpr int kPerStep = 2, kRows = 8;

  using Mask = __mmask32;

  static Mask true_bytes(__m256i bytes) { return _mm256_cmpneq_epi8_mask(bytes, _mm256_setzero_si256()); }
  static Mask mask(const bool* from) { return true_bytes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
  static Mask mask(const bool* from, std::int64_t count) {
    return true_bytes(_mm512_castsi512_si256(load_bytes(from, count)));
  }
  static Mask mask_in_turn(const bool* even, const bool* odd) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
    return true_bytes(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
  }
  static Vector keep(Vector x, Mask mask) {
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(mask, _mm512_castps_si512(x)));
  }

  static Vector product(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(b), (__m512bh)_mm512_castps_si512(a));
  }

  static Vector places(const BFloat16* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); }

  template <typename T>
  static Vector places(const T* from) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(load16(from + 16), load16(from)));
  }

  static Vector places(const BFloat16* from, std::int64_t count) {
    return _mm512_castsi512_ps(load_bytes(from, 2 * count));
  }

  template <typename T>
  static Vector places(const T* from, std::int64_t count) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(load(from + kLanes, count - kLanes), load(from, count)));
  }

  // The words of two rows in turn.
  template <typename T>
  static Vector side_by_side(const T* even, const T* odd) {
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(words_in_turn(), both(even, odd)));
  }

  static __m512i both(const BFloat16* even, const BFloat16* odd) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)),
                              1);
  }

  template <typename T>
  static __m512i both(const T* even, const T* odd) {
    return (__m512i)_mm512_cvtne2ps_pbh(load16(odd), load16(even));
  }
};

}  // namespace

void row_products_avx512_bf16(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Avx512Bf16>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
