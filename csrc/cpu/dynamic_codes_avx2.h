// The 8-bit codes of the dynamic codebooks for AVX2: encoded as dynamic_codes.h tells, in registers. A file of kernels
// includes this inside its target region, after dynamic_codes.h.
namespace qlora::cpu {
namespace {

template <bool kSigned>
struct DynamicCodes {
  static constexpr std::int64_t kDecoded = 1, kEncoded = 32;
  using L = Lines<kSigned>;
  __m256i end;
  __m256 scale;

  static constexpr const DynamicCodebook& book() { return dynamic_codebook<kSigned>(); }

  DynamicCodes()
      : end(_mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLines<kSigned>.end)), kSigned)),
        scale(_mm256_loadu_ps(kLines<kSigned>.scale)) {}

  // One by one: gathering them takes longer, and so does any arithmetic.
  void decode(const std::uint8_t* codes, __m256* out) const {
    const float* value = book().value;
    *out = _mm256_setr_ps(value[codes[0]], value[codes[1]], value[codes[2]], value[codes[3]], value[codes[4]],
                          value[codes[5]], value[codes[6]], value[codes[7]]);
  }

  // 8 values' magnitudes, at least kLeast, and their lines; tied: those at the end of one, which are searched, as AVX2
  // has no rotation.
  struct Placed8 {
    __m256 magnitude;
    __m256i shift, tied;
  };
  struct Placed {
    Placed8 a, b, c, d;
  };

  // 32 values.
  [[gnu::always_inline]] Placed place(const float* values, float inverse) const {
    return {place8(values, inverse), place8(values + 8, inverse), place8(values + 16, inverse),
            place8(values + 24, inverse)};
  }

  [[gnu::always_inline]] void encode(const Placed& placed, const float* values, float inverse,
                                     std::uint8_t* codes) const {
    const __m256i a = number(placed.a), b = number(placed.b), c = number(placed.c), d = number(placed.d);
    // Upper words hold numbers, lower ones fractions. The packs work inside 128-bit lanes.
    const __m256i words = _mm256_packus_epi16(_mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa),
                                              _mm256_blend_epi16(_mm256_srli_epi32(c, 16), d, 0xaa));
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m256i code = code_of(_mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order)), values);
    const __m256i ordered = _mm256_permutevar8x32_epi32(code, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), ordered);
    const __m256i most = _mm256_max_epu16(_mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa),
                                          _mm256_blend_epi16(c, _mm256_slli_epi32(d, 16), 0xaa));
    if (__builtin_expect(_mm256_movemask_epi8(unsure(most)) != 0, 0)) search(values, inverse, codes);
  }

  // By their fractions, in words.
  static __m256i unsure(__m256i fractions) {
    return _mm256_cmpeq_epi16(fractions, _mm256_max_epu16(fractions, _mm256_set1_epi16(-L::kUnsure)));
  }

  // As the format says.
  [[gnu::noinline]] void search(const float* values, float inverse, std::uint8_t* codes) const {
    for (int i = 0; i < kEncoded; i += 8) {
      const __m256i fractions = _mm256_slli_epi32(number(place8(values + i, inverse)), 16);
      auto chosen = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(unsure(fractions))));
      for (; chosen != 0; chosen &= chosen - 1) {
        const int at = i + __builtin_ctz(chosen);
        codes[at] = encode_dynamic(book().bound, values[at] * inverse);
      }
    }
  }

  // Of 32 numbers, ordered as packs leave them, and their values.
  static __m256i code_of(__m256i numbers, const float* values) {
    if constexpr (!kSigned) return _mm256_sub_epi8(numbers, _mm256_set1_epi8(1));
    const auto* from = reinterpret_cast<const __m256i*>(values);
    const __m256i signs =
        _mm256_packs_epi16(_mm256_packs_epi32(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)),
                           _mm256_packs_epi32(_mm256_loadu_si256(from + 2), _mm256_loadu_si256(from + 3)));
    const __m256i zero = _mm256_set1_epi8(127);  // there is no -1 among the codes: 127 - 128 is 0
    return _mm256_blendv_epi8(_mm256_add_epi8(zero, numbers), _mm256_subs_epu8(zero, numbers), signs);
  }

  [[gnu::always_inline]] Placed8 place8(const float* values, float inverse) const {
    const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(values), _mm256_set1_ps(inverse)));
    const __m256i magnitude = kSigned ? _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)) : bits;
    const __m256i floored = _mm256_max_epi32(magnitude, _mm256_castps_si256(_mm256_set1_ps(L::kLeast)));
    const __m256i below = _mm256_subs_epu16(_mm256_set1_epi32(L::kFrom << 16), floored);  // the lower words: 0
    const __m256i shift = _mm256_srli_epi32(_mm256_madd_epi16(below, _mm256_set1_epi32(L::kLog << 16)), 16);
    const __m256i line_end = _mm256_permutevar8x32_epi32(end, shift);
    const __m256i beyond = _mm256_cmpgt_epi32(magnitude, line_end);
    const __m256i tied = kSigned ? _mm256_cmpeq_epi32(magnitude, line_end) : _mm256_setzero_si256();
    return {_mm256_castsi256_ps(floored), _mm256_add_epi32(shift, beyond), tied};
  }

  // In fixed point; where it is tied, unsure.
  [[gnu::always_inline]] __m256i number(const Placed8& x) const {
    const __m256 line_scale = _mm256_permutevar8x32_ps(scale, x.shift);
    const __m256 y =
        _mm256_min_ps(_mm256_fmadd_ps(x.magnitude, line_scale, _mm256_set1_ps(L::kOffset)), _mm256_set1_ps(L::kMost));
    const __m256i mantissa = _mm256_and_si256(_mm256_castps_si256(y), _mm256_set1_epi32(L::kMantissa));
    return _mm256_or_si256(_mm256_srlv_epi32(mantissa, x.shift), x.tied);
  }
};

}  // namespace
}  // namespace qlora::cpu
