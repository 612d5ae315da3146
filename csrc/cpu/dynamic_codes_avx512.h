// The 8-bit codes of the dynamic codebooks for AVX512 (F, BW, DQ, VL): what dynamic_codes.h tells, in registers. A file
// of kernels includes this inside its target region, after dynamic_codes.h and dynamic_lookup_avx512.h or its twin for
// VBMI.

namespace qlora::cpu {
namespace {

template <bool kSigned>
struct DynamicCodes {
  static constexpr std::int64_t kDecoded = kLookedUp / 16, kEncoded = 64;
  __m512i end, last;
  __m512 scale, offset;

  static constexpr const DynamicCodebook& book() { return state_codebook<kSigned>(); }

  // In a register for 16.
  static __m512i eight_lines(const void* lines) {
    return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_loadu_si256(static_cast<const __m256i*>(lines)), 0);
  }

  DynamicCodes()
      : end(eight_lines(kLines<kSigned>.end)),
        last(eight_lines(kLines<kSigned>.last)),
        scale(_mm512_castsi512_ps(eight_lines(kLines<kSigned>.scale))),
        offset(_mm512_castsi512_ps(eight_lines(kLines<kSigned>.offset))) {}

  void decode(const std::uint8_t* codes, __m512 (&values)[kDecoded]) const {
    look_up_values<book()>(_mm512_maskz_loadu_epi8(~0ull >> (64 - kLookedUp), codes), values);
  }

  // 16 values' magnitudes, and their lines.
  struct Placed16 {
    __m512 magnitude;
    __m512i line;
  };
  struct Placed {
    Placed16 a, b, c, d;
  };

  // 64 values.
  [[gnu::always_inline]] Placed place(const float* values, float inverse) const {
    return {place16(values, inverse), place16(values + 16, inverse), place16(values + 32, inverse),
            place16(values + 48, inverse)};
  }

  [[gnu::always_inline]] void encode(const Placed& placed, const float* values, float inverse,
                                     std::uint8_t* codes) const {
    const __m512i sum[4] = {sums_of(placed.a), sums_of(placed.b), sums_of(placed.c), sums_of(placed.d)};
    const __m512i code[2] = {join(values, sum[0], sum[1]), join(values + 32, sum[2], sum[3])};
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packing works inside 128-bit lanes
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(code[0], code[1])));
    // The least fractions; of the words beside them nothing is asked.
    const __m512i least = _mm512_min_epu16(_mm512_min_epu16(sum[0], sum[1]), _mm512_min_epu16(sum[2], sum[3]));
    if (__builtin_expect(sure(least) != 0xffff, 0)) {
      search(values, inverse, ~(sure(sum[0]) | sure(sum[1]) << 16), codes);
      search(values + 32, inverse, ~(sure(sum[2]) | sure(sum[3]) << 16), codes + 32);
    }
  }

  static unsigned sure(__m512i sum) { return _mm512_test_epi32_mask(sum, _mm512_set1_epi32(Lines::kSureMask)); }

  // Those whose bits are set, as the format says.
  [[gnu::noinline]] static void search(const float* values, float inverse, unsigned chosen, std::uint8_t* codes) {
    for (; chosen != 0; chosen &= chosen - 1) {
      const int i = __builtin_ctz(chosen);
      codes[i] = encode_dynamic(book().bound, values[i] * inverse);
    }
  }

  // Of 32 values, from their sums: codes, as words.
  static __m512i join(const float* values, __m512i sum0, __m512i sum1) {
    const __m512i ranks = upper_words(sum0, sum1);
    if constexpr (!kSigned) return ranks;
    const __m512i zero = _mm512_set1_epi16(127);
    const __mmask32 negative =
        _mm512_movepi16_mask(upper_words(_mm512_loadu_si512(values), _mm512_loadu_si512(values + 16)));
    return _mm512_mask_mov_epi16(_mm512_add_epi16(zero, ranks), negative, _mm512_sub_epi16(zero, ranks));
  }

  static __m512i upper_words(__m512i a, __m512i b) {
    alignas(64) static constexpr std::uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(kOdd), b);
  }

  [[gnu::always_inline]] Placed16 place16(const float* values, float inverse) const {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(inverse));
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i magnitude = kSigned ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)) : bits;
    const __m512i upper = _mm512_max_epi32(_mm512_srli_epi32(magnitude, 16), _mm512_set1_epi32(Lines::kLeast));
    const __m512i line = _mm512_mulhi_epi16(upper, _mm512_set1_epi32(Lines::kLog));
    const __m512i compared = kSigned ? _mm512_rol_epi32(bits, 1) : bits;
    const __mmask16 beyond = _mm512_cmpgt_epi32_mask(compared, _mm512_permutexvar_epi32(line, end));
    return {_mm512_castsi512_ps(magnitude), _mm512_mask_sub_epi32(line, beyond, line, _mm512_set1_epi32(-1))};
  }

  // Rank and fraction, in fixed point.
  [[gnu::always_inline]] __m512i sums_of(const Placed16& x) const {
    const __m512 on_line =
        _mm512_fmadd_ps(x.magnitude, _mm512_permutexvar_ps(x.line, scale), _mm512_permutexvar_ps(x.line, offset));
    const __m512i sum = _mm512_cvtps_epi32(on_line), most = _mm512_permutexvar_epi32(x.line, last);
    if constexpr (kSigned) return _mm512_min_epi32(sum, most);
    const __m512i half = _mm512_set1_epi32(1 << (Lines::kFractionBits - 1));  // 0 has rank 0, and is sure of it
    const __mmask16 positive = _mm512_cmpgt_epi32_mask(_mm512_castps_si512(x.magnitude), _mm512_setzero_si512());
    return _mm512_mask_min_epi32(half, positive, sum, most);
  }
};

}  // namespace
}  // namespace qlora::cpu
