// The values of 8-bit codes of a dynamic codebook for AVX512 with VBMI, 64 at once: byte by byte, as two registers hold
// a table for lookups of 128 bytes; and 64 numbers as bytes, picked out of so many. A file of kernels includes this
// inside its target region.
#include "../codebook.h"  // a file of kernels has it before its target region: nothing is compiled here
#include "value_bytes.h"

namespace qlora::cpu {
namespace {

inline __m512i look_up_bytes(const std::uint8_t* table, __m512i codes) {
  const auto among = [&](int first) {  // 128 of the bytes
    return _mm512_permutex2var_epi8(_mm512_load_si512(table + first), codes, _mm512_load_si512(table + first + 64));
  };
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), among(0), among(128));
}

constexpr int kLookedUp = 64;  // codes at once

template <const DynamicCodebook& kBook>
inline void look_up_values(__m512i codes, __m512 (&values)[kLookedUp / 16]) {
  static constexpr ValueBytes<kNumDynamicCodes> kBytes = bytes_of(kBook.value);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // undone by unpacking
  const __m512i ordered = _mm512_permutexvar_epi32(order, codes);
  __m512i bytes[4];
  for (int i = 0; i < 4; ++i) bytes[i] = look_up_bytes(kBytes.byte[i], ordered);
  const __m512i low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
  const __m512i high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
  for (int i = 0; i < 2; ++i) {
    values[2 * i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[i], high[i]));
    values[2 * i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[i], high[i]));
  }
}

struct BytesOfDwords {
  alignas(64) std::uint8_t at[64];
  explicit constexpr BytesOfDwords(int which) : at{} {
    for (int i = 0; i < 64; ++i) at[i] = static_cast<std::uint8_t>(4 * (i % 32) + which);
  }
};

// Byte kWhich of each of 64 dwords.
template <int kWhich>
inline __m512i pick_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  static constexpr BytesOfDwords kBytes(kWhich);
  const __m512i at = _mm512_load_si512(kBytes.at);
  return _mm512_mask_blend_epi8(~0ull << 32, _mm512_permutex2var_epi8(a, at, b), _mm512_permutex2var_epi8(c, at, d));
}

inline __m512i third_bytes(__m512i a, __m512i b, __m512i c, __m512i d) { return pick_bytes<2>(a, b, c, d); }

// Of 64 values.
inline __mmask64 negative(const float* values) {
  return _mm512_movepi8_mask(pick_bytes<3>(_mm512_loadu_si512(values), _mm512_loadu_si512(values + 16),
                                           _mm512_loadu_si512(values + 32), _mm512_loadu_si512(values + 48)));
}

}  // namespace
}  // namespace qlora::cpu
