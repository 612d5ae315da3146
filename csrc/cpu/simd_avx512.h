// What the AVX512 kernels share: loads and stores of 16 numbers of any dtype, and of the first so many bytes; indices
// of words in turn and of 4-bit codes for lookups; sums or the like across lanes, a transposition; and vectors as a
// class. A file of kernels includes this inside its target region.
namespace qlora::cpu {
namespace {

inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load16(const BFloat16* from) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline __m512 load16(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// fp32 -> bf16 to nearest even, subnormals and NaN as the format wants them (vcvtneps2bf16 flushes subnormals).
inline __m256i round16(__m512 x, BFloat16) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i nan = _mm512_set1_epi32(0x7fc0);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan));
}

inline __m256i round16(__m512 x, Half) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

inline void store16(float* to, __m512 x) { _mm512_storeu_ps(to, x); }

template <typename T>  // bf16 or fp16
void store16(T* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round16(x, T{}));
}

inline std::uint64_t first_bits(std::int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

// The first min(count, 64) bytes, then zeros.
inline __m512i load_bytes(const void* from, std::int64_t count) {
  return _mm512_maskz_loadu_epi8(first_bits(count), from);
}

// The words of both halves in turn, for vpermw: word 2j is word j, word 2j + 1 is word 16 + j.
inline __m512i words_in_turn() {
  const __m512i j = _mm512_cvtepu8_epi32(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return _mm512_or_si512(j, _mm512_slli_epi32(_mm512_add_epi32(j, _mm512_set1_epi32(16)), 16));
}

struct Sum {
  __m512 operator()(__m512 a, __m512 b) const { return a + b; }
};

// All lanes of each of 16 vectors combined, the i-th to lane i: pairs of vectors become one of half as many lanes each,
// four times.
template <typename Combine>
__m512 across_lanes(const __m512* x, Combine combine) {
  __m512 eight[8], four[4], two[2];
  for (int i = 0; i < 8; ++i) {
    eight[i] = combine(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(eight[2 * i]), b = _mm512_castps_pd(eight[2 * i + 1]);
    four[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto quarters = [&](__m512 a, __m512 b) {
    return combine(_mm512_shuffle_f32x4(a, b, 0b10001000), _mm512_shuffle_f32x4(a, b, 0b11011101));
  };
  for (int i = 0; i < 2; ++i) two[i] = quarters(four[2 * i], four[2 * i + 1]);
  return quarters(two[0], two[1]);
}

inline __m512d low_pairs(const __m512* x) { return _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1])); }
inline __m512d high_pairs(const __m512* x) { return _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1])); }

// Lane j of vector i goes to lane i of vector j: first within quarters of 4 lanes, then the quarters.
inline void transpose(__m512 (&x)[16]) {
  __m512 quarters[4][4];  // [j][i]: the j-th of 4 lanes, of every quarter, of rows 4 i to 4 i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512* row = x + 4 * i;
    const __m512d low[2] = {low_pairs(row), low_pairs(row + 2)};
    const __m512d high[2] = {high_pairs(row), high_pairs(row + 2)};
    quarters[0][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
    quarters[1][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
    quarters[2][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
    quarters[3][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512(&of)[4] = quarters[j];
    const __m512 even[2] = {_mm512_shuffle_f32x4(of[0], of[1], 0b10001000),
                            _mm512_shuffle_f32x4(of[2], of[3], 0b10001000)};
    const __m512 odd[2] = {_mm512_shuffle_f32x4(of[0], of[1], 0b11011101),
                           _mm512_shuffle_f32x4(of[2], of[3], 0b11011101)};
    x[j] = _mm512_shuffle_f32x4(even[0], even[1], 0b10001000);
    x[8 + j] = _mm512_shuffle_f32x4(even[0], even[1], 0b11011101);
    x[4 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0b10001000);
    x[12 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0b11011101);
  }
}

// The vectors of loops that are written for any instruction set.
struct Avx512Vectors {
  using Vector = __m512;
  static constexpr std::int64_t kLanes = 16;

  static Vector splat(float x) { return _mm512_set1_ps(x); }

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

  template <typename T>
  static void store(T* to, Vector x) {
    store16(to, x);
  }

  static void transpose(Vector (&x)[kLanes]) { cpu::transpose(x); }
};

// The dword indices of the 16 codes of 8 bytes; a lookup uses their low 4 bits only, so they need no mask.
inline __m512i indices(const std::uint8_t* packed) {
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  return _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
}

}  // namespace
}  // namespace qlora::cpu
