// The codes of quantize_absmax for AVX512: 16 binary searches at once, each level of bounds in registers.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

namespace qlora::cpu {
namespace {

// Level l has the 2^l bounds that the search may meet after l comparisons, from its 2^l-th place on.
struct Levels {
  alignas(64) float bound[256];
};

constexpr Levels levels() {
  Levels tree{};
  for (int level = 0; level < 8; ++level) {
    const int half = 128 >> level;
    for (int i = 0; i < 1 << level; ++i) tree.bound[(1 << level) + i] = kDynamicCodebook.bound[2 * half * i + half - 1];
  }
  return tree;
}

// table[index], of `size` floats: a register for 16 of them, two for each lookup.
template <int size>
__m512 look_up(const float* table, __m512i index) {
  if constexpr (size <= 16) {
    return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << size) - 1), table));
  } else if constexpr (size == 32) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
  } else {
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(size / 2));
    return _mm512_mask_blend_ps(upper, look_up<size / 2>(table, index), look_up<size / 2>(table + size / 2, index));
  }
}

template <int level>
__m512i search(const float* bound, __m512 x, __m512i found) {
  if constexpr (level == 8) {
    return found;
  } else {
    const __mmask16 above = _mm512_cmp_ps_mask(x, look_up<1 << level>(bound + (1 << level), found), _CMP_GT_OQ);
    const __m512i twice = _mm512_add_epi32(found, found);
    return search<level + 1>(bound, x, _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1)));
  }
}

}  // namespace

void encode_absmax_avx512(const float* absmax, std::int64_t n, float offset, float inverse, std::uint8_t* codes) {
  static constexpr Levels kLevels = levels();
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(absmax + i), _mm512_set1_ps(offset));
    const __m512i found = search<0>(kLevels.bound, _mm512_mul_ps(difference, _mm512_set1_ps(inverse)), __m512i{});
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(found));
  }
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
