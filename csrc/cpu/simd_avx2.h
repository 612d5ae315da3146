// What the AVX2 kernels share: loads and stores of 8 numbers of any dtype, the largest of 8, a transposition, vectors
// as a class, and the lookup of fp32 codes. A file of kernels includes this inside its target region.
#include "value_bytes.h"  // made by the compiler, so in any region

namespace qlora::cpu {
namespace {

inline __m256 load8(const float* from) { return _mm256_loadu_ps(from); }

inline __m256 load8(const BFloat16* from) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

inline __m256 load8(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// fp32 -> bf16 to nearest even in the low word of each dword.
inline __m256i round_dwords(__m256 x, BFloat16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
}

inline __m256i round_dwords(__m256 x, Half) {
  return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline void store8(float* to, __m256 x) { _mm256_storeu_ps(to, x); }

// The low words of dwords whose high ones are 0.
inline void store_words(BFloat16* to, __m256i dwords) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
}

inline void store8(BFloat16* to, __m256 x) { store_words(to, round_dwords(x, BFloat16{})); }

inline void store8(Half* to, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline std::uint32_t largest_lane(__m256i x) {
  __m128i largest = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0b01001110));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0b10110001));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(largest));
}

inline __m256d low_pairs(const __m256* x) { return _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1])); }
inline __m256d high_pairs(const __m256* x) { return _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1])); }

// Lane j of vector i goes to lane i of vector j: first within halves of 4 lanes, then the halves.
inline void transpose(__m256 (&x)[8]) {
  __m256 halves[4][2];  // [j][i]: the j-th of 4 lanes, of both halves, of rows 4 i to 4 i + 3
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256* row = x + 4 * i;
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

// The vectors of loops that are written for any instruction set.
struct Avx2Vectors {
  using Vector = __m256;
  static constexpr std::int64_t kLanes = 8;

  static Vector splat(float x) { return _mm256_set1_ps(x); }

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

  template <typename T>
  static void store(T* to, Vector x) {
    store8(to, x);
  }

  static void transpose(Vector (&x)[kLanes]) { cpu::transpose(x); }
};

inline __m256i load_plane(const std::uint8_t (&bytes)[kNumCodes]) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// A codebook's values by bytes, for vpshufb.
struct Planes {
  static constexpr ValueBytes<kNumCodes> kBytes[] = {bytes_of(codebook(QuantType::NF4).value),
                                                     bytes_of(codebook(QuantType::FP4).value)};
  __m256i plane[4];

  explicit Planes(QuantType quant_type) {
    for (int i = 0; i < 4; ++i) plane[i] = load_plane(kBytes[static_cast<int>(quant_type)].byte[i]);
  }
};

// The values of 32 codes, one a byte: out[q] has those of bytes 4q ... 4q + 3 of each 128-bit lane.
inline void expand(const Planes& planes, __m256i codes, __m256 (&out)[4]) {
  const __m256i b0 = _mm256_shuffle_epi8(planes.plane[0], codes);
  const __m256i b1 = _mm256_shuffle_epi8(planes.plane[1], codes);
  const __m256i b2 = _mm256_shuffle_epi8(planes.plane[2], codes);
  const __m256i b3 = _mm256_shuffle_epi8(planes.plane[3], codes);
  const __m256i low[2] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
  const __m256i high[2] = {_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3)};
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
    out[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
  }
}

}  // namespace
}  // namespace qlora::cpu
