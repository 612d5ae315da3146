// The 8-bit codes of the dynamic codebooks for AVX512 (F, BW, DQ, VL): what dynamic_codes.h tells, in registers. A file
// of kernels includes this inside its target region, after dynamic_codes.h and dynamic_lookup_avx512.h or its twin for
// VBMI.

namespace qlora::cpu {
namespace {

template <bool kSigned>
struct DynamicCodes {
  static constexpr std::int64_t kDecoded = kLookedUp / 16, kEncoded = 64;
  using L = Lines<kSigned>;

  static constexpr const DynamicCodebook& book() { return dynamic_codebook<kSigned>(); }

  static void decode(const std::uint8_t* codes, __m512 (&values)[kDecoded]) {
    look_up_values<book()>(_mm512_maskz_loadu_epi8(~0ull >> (64 - kLookedUp), codes), values);
  }

  // 16 values' magnitudes, at least kLeast, and their lines.
  struct Placed16 {
    __m512 magnitude;
    __m512i shift;
  };
  struct Placed {
    Placed16 a, b, c, d;
  };

  // 64 values.
  [[gnu::always_inline]] static Placed place(const float* values, float inverse) {
    return {place16(values, inverse), place16(values + 16, inverse), place16(values + 32, inverse),
            place16(values + 48, inverse)};
  }

  [[gnu::always_inline]] static void encode(const Placed& placed, const float* values, float inverse,
                                            std::uint8_t* codes) {
    const __m512i a = number(placed.a), b = number(placed.b), c = number(placed.c), d = number(placed.d);
    const __m512i numbers = third_bytes(a, b, c, d);
    _mm512_storeu_si512(codes, kSigned ? with_signs(numbers, values) : _mm512_sub_epi8(numbers, _mm512_set1_epi8(1)));
    if (__builtin_expect(unsure(_mm512_max_epu16(_mm512_max_epu16(a, b), _mm512_max_epu16(c, d))) != 0, 0)) {
      search(values, inverse, unsure(a), codes);
      search(values + 16, inverse, unsure(b), codes + 16);
      search(values + 32, inverse, unsure(c), codes + 32);
      search(values + 48, inverse, unsure(d), codes + 48);
    }
  }

  // By the fractions of 16 numbers, each in the lower of two words; the upper ones are small.
  static __mmask32 unsure(__m512i numbers) { return _mm512_cmpge_epu16_mask(numbers, _mm512_set1_epi16(-L::kUnsure)); }

  // As the format says, every other bit for a value.
  [[gnu::noinline]] static void search(const float* values, float inverse, __mmask32 chosen, std::uint8_t* codes) {
    for (; chosen != 0; chosen &= chosen - 1) {
      const int i = __builtin_ctz(chosen) / 2;
      codes[i] = encode_dynamic(book().bound, values[i] * inverse);
    }
  }

  static __m512i with_signs(__m512i numbers, const float* values) {
    const __m512i zero = _mm512_set1_epi8(127);  // there is no -1 among the codes: 127 - 128 is 0
    return _mm512_mask_subs_epu8(_mm512_add_epi8(zero, numbers), negative(values), zero, numbers);
  }

  [[gnu::always_inline]] static Placed16 place16(const float* values, float inverse) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(inverse)), least = _mm512_set1_ps(L::kLeast);
    const __m512i bits = _mm512_castps_si512(x);
    constexpr int kLargerMagnitude = 0b1011;
    const __m512i floored = kSigned ? _mm512_castps_si512(_mm512_range_ps(x, least, kLargerMagnitude))
                                    : _mm512_max_epi32(bits, _mm512_castps_si512(least));
    const __m512i exponent = _mm512_srli_epi32(floored, 23);
    const __m512i shift = look_up(kOctaves<kSigned>.shift, exponent);
    const __m512i compared = kSigned ? _mm512_rol_epi32(bits, 1) : bits;
    const __mmask16 beyond = _mm512_cmpgt_epi32_mask(compared, look_up(kOctaves<kSigned>.end, exponent));
    return {_mm512_castsi512_ps(floored), _mm512_mask_add_epi32(shift, beyond, shift, _mm512_set1_epi32(-1))};
  }

  static __m512i look_up(const std::int32_t (&table)[32], __m512i indices) {  // modulo 32
    return _mm512_permutex2var_epi32(_mm512_load_si512(table), indices, _mm512_load_si512(table + 16));
  }

  // In fixed point.
  [[gnu::always_inline]] static __m512i number(const Placed16& x) {
    const __m512 line_scale = _mm512_permutexvar_ps(x.shift, _mm512_loadu_ps(kLines<kSigned>.scale));
    const __m512 y =
        _mm512_min_ps(_mm512_fmadd_ps(x.magnitude, line_scale, _mm512_set1_ps(L::kOffset)), _mm512_set1_ps(L::kMost));
    const __m512i mantissa = _mm512_and_si512(_mm512_castps_si512(y), _mm512_set1_epi32(L::kMantissa));
    return _mm512_srlv_epi32(mantissa, x.shift);
  }
};

}  // namespace
}  // namespace qlora::cpu
