// The values of 8-bit codes of a dynamic codebook, 32 at once: in halves, as registers hold tables for lookups of 64
// words but of 32 floats only; and 64 numbers as bytes, by words, too. With VBMI, dynamic_lookup_avx512_vbmi.h does the
// same faster. A file of kernels includes one of the two inside its target region.
#include "../codebook.h"  // a file of kernels has it before its target region: nothing is compiled here

namespace qlora::cpu {
namespace {

struct DynamicHalves {
  alignas(64) std::uint16_t low[kNumDynamicCodes], high[kNumDynamicCodes];
};

constexpr DynamicHalves halve(const DynamicCodebook& book) {
  DynamicHalves halves{};
  for (int code = 0; code < kNumDynamicCodes; ++code) {
    const auto bits = __builtin_bit_cast(std::uint32_t, book.value[code]);
    halves.low[code] = static_cast<std::uint16_t>(bits);
    halves.high[code] = static_cast<std::uint16_t>(bits >> 16);
  }
  return halves;
}

inline __m512i look_up_words(const std::uint16_t* table, __m512i codes) {
  const auto among = [&](int first) {  // 64 of the words
    const __m512i a = _mm512_load_si512(table + first), b = _mm512_load_si512(table + first + 32);
    return _mm512_permutex2var_epi16(a, codes, b);
  };
  const __mmask32 bit6 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
  const __mmask32 bit7 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
  return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, among(0), among(64)),
                                 _mm512_mask_blend_epi16(bit6, among(128), among(192)));
}

constexpr int kLookedUp = 32;  // codes at once, in the lowest bytes

template <const DynamicCodebook& kBook>
inline void look_up_values(__m512i codes, __m512 (&values)[kLookedUp / 16]) {
  static constexpr DynamicHalves kHalves = halve(kBook);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undone by unpacking
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(_mm512_castsi512_si256(codes), order));
  const __m512i low = look_up_words(kHalves.low, words), high = look_up_words(kHalves.high, words);
  values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

inline __m512i upper_words(__m512i a, __m512i b) {
  alignas(64) static constexpr std::uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                         23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                         45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(kOdd), b);
}

// Of 64 dwords, whose fourth bytes are 0.
inline __m512i third_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i packed = _mm512_packus_epi16(upper_words(a, b), upper_words(c, d));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);  // packing works in 128-bit lanes
}

// Of 64 values.
inline __mmask64 negative(const float* values) {
  const auto of_32 = [](const float* from) {
    return _mm512_movepi16_mask(upper_words(_mm512_loadu_si512(from), _mm512_loadu_si512(from + 16)));
  };
  return of_32(values) | static_cast<__mmask64>(of_32(values + 32)) << 32;
}

}  // namespace
}  // namespace qlora::cpu
