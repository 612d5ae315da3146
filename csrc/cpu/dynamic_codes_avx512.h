// The 8-bit codes of the dynamic codebooks for AVX512 (F, BW, DQ, VL): what dynamic_codes.h tells, in registers. A file
// of kernels includes this inside its target region, after dynamic_codes.h and dynamic_lookup_avx512.h or its twin for
// VBMI.

namespace qlora::cpu {
namespace {

template <bool kSigned>
struct DynamicCodes {
  static constexpr std::int64_t kDecoded = kLookedUp / 16, kEncoded = 64;
  using L = Lines<kSigned>;
  __m512i end;
  __m512 scale;

  static constexpr const DynamicCodebook& book() { return dynamic_codebook<kSigned>(); }

  // By shift modulo 8 in a register of 16.
  static __m512i twice(const void* lines) {
    const __m256i eight = _mm256_loadu_si256(static_cast<const __m256i*>(lines));
    return _mm512_inserti64x4(_mm512_castsi256_si512(eight), eight, 1);
  }

  DynamicCodes() : end(twice(kLines<kSigned>.end)), scale(_mm512_castsi512_ps(twice(kLines<kSigned>.scale))) {}

  void decode(const std::uint8_t* codes, __m512 (&values)[kDecoded]) const {
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
  [[gnu::always_inline]] Placed place(const float* values, float inverse) const {
    return {place16(values, inverse), place16(values + 16, inverse), place16(values + 32, inverse),
            place16(values + 48, inverse)};
  }

  [[gnu::always_inline]] void encode(const Placed& placed, const float* values, float inverse,
                                     std::uint8_t* codes) const {
    const __m512i a = number(placed.a), b = number(placed.b), c = number(placed.c), d = number(placed.d);
    const __m512i packed = _mm512_packus_epi16(join(values, a, b), join(values + 32, c, d));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packing works inside 128-bit lanes
    const __m512i ordered = _mm512_permutexvar_epi64(order, packed);
    _mm512_storeu_si512(codes, kSigned ? ordered : _mm512_sub_epi8(ordered, _mm512_set1_epi8(1)));
    // The greatest fractions; of the words beside them nothing is asked.
    const __m512i most = _mm512_max_epu16(_mm512_max_epu16(a, b), _mm512_max_epu16(c, d));
    if (__builtin_expect(sure(most) != 0xffff, 0)) {
      search(values, inverse, ~(sure(a) | sure(b) << 16), codes);
      search(values + 32, inverse, ~(sure(c) | sure(d) << 16), codes + 32);
    }
  }

  static unsigned sure(__m512i number) {
    static_assert(std::has_single_bit(unsigned{L::kUnsure}));
    const __m512i below = _mm512_set1_epi32(0x10000 - L::kUnsure);  // has all bits that unsure fractions have
    return _mm512_test_epi32_mask(_mm512_andnot_si512(number, below), below);
  }

  // Those whose bits are set, as the format says.
  [[gnu::noinline]] static void search(const float* values, float inverse, unsigned chosen, std::uint8_t* codes) {
    for (; chosen != 0; chosen &= chosen - 1) {
      const int i = __builtin_ctz(chosen);
      codes[i] = encode_dynamic(book().bound, values[i] * inverse);
    }
  }

  // Of 32 values: signed, their codes, else their numbers, as words.
  static __m512i join(const float* values, __m512i first, __m512i second) {
    const __m512i numbers = upper_words(first, second);
    if constexpr (!kSigned) return numbers;
    const __m512i zero = _mm512_set1_epi16(127);  // there is no -1 among the codes: the pack makes it 0
    const __mmask32 negative =
        _mm512_movepi16_mask(upper_words(_mm512_loadu_si512(values), _mm512_loadu_si512(values + 16)));
    return _mm512_mask_mov_epi16(_mm512_add_epi16(zero, numbers), negative, _mm512_sub_epi16(zero, numbers));
  }

  static __m512i upper_words(__m512i a, __m512i b) {
    alignas(64) static constexpr std::uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(kOdd), b);
  }

  [[gnu::always_inline]] Placed16 place16(const float* values, float inverse) const {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(inverse)));
    const __m512i magnitude = kSigned ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)) : bits;
    const __m512i floored = _mm512_max_epi32(magnitude, _mm512_castps_si512(_mm512_set1_ps(L::kLeast)));
    const __m512i below = _mm512_subs_epu16(_mm512_set1_epi32(L::kFrom << 16), floored);  // the lower words: 0
    const __m512i shift = _mm512_srli_epi32(_mm512_madd_epi16(below, _mm512_set1_epi32(L::kLog << 16)), 16);
    const __m512i compared = kSigned ? _mm512_rol_epi32(bits, 1) : bits;
    const __mmask16 beyond = _mm512_cmpgt_epi32_mask(compared, _mm512_permutexvar_epi32(shift, end));
    return {_mm512_castsi512_ps(floored), _mm512_mask_add_epi32(shift, beyond, shift, _mm512_set1_epi32(-1))};
  }

  // In fixed point.
  [[gnu::always_inline]] __m512i number(const Placed16& x) const {
    const __m512 line_scale = _mm512_permutexvar_ps(x.shift, scale);
    const __m512 y =
        _mm512_min_ps(_mm512_fmadd_ps(x.magnitude, line_scale, _mm512_set1_ps(L::kOffset)), _mm512_set1_ps(L::kMost));
    const __m512i mantissa = _mm512_and_si512(_mm512_castps_si512(y), _mm512_set1_epi32(L::kMantissa));
    return _mm512_srlv_epi32(mantissa, x.shift);
  }
};

}  // namespace
}  // namespace qlora::cpu
