// The 8-bit codes of the dynamic codebooks for AVX2: what dynamic_codes.h tells, in registers. A file of kernels
// includes this inside its target region, after dynamic_codes.h.
namespace qlora::cpu {
namespace {

template <bool kSigned>
struct DynamicCodes {
  static constexpr std::int64_t kDecoded = 1, kEncoded = 32;
  __m256i end, last;
  __m256 scale, offset, width, half;

  static constexpr const DynamicCodebook& book() { return state_codebook<kSigned>(); }

  DynamicCodes()
      : end(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLines<kSigned>.end))),
        last(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLines<kSigned>.last))),
        scale(_mm256_loadu_ps(kLines<kSigned>.scale)),
        offset(_mm256_loadu_ps(kLines<kSigned>.offset)),
        width(_mm256_loadu_ps(kCells<kSigned>.width)),
        half(_mm256_loadu_ps(kCells<kSigned>.half)) {}

  void decode(const std::uint8_t* codes, __m256* out) const {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256i from_zero = kSigned ? _mm256_sub_epi32(code, _mm256_set1_epi32(127)) : code;
    const __m256i n = kSigned ? _mm256_abs_epi32(from_zero) : _mm256_add_epi32(code, _mm256_set1_epi32(1));
    const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(n));
    const __m256i decade = _mm256_srli_epi32(bits, 23);
    const __m256 one = _mm256_set1_ps(1.0f), range = _mm256_set1_ps(kDecadeRange);
    const __m256 mantissa =
        _mm256_or_ps(_mm256_and_ps(_mm256_castsi256_ps(bits), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff))), one);
    const __m256 upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 9));   // in the sign
    const __m256 end = _mm256_blendv_ps(_mm256_set1_ps(0.1f), one, upper_half);  // that the edges are counted from
    const __m256 place = _mm256_sub_ps(mantissa, _mm256_blendv_ps(one, _mm256_set1_ps(2.0f), upper_half));
    const __m256 next = _mm256_add_ps(place, _mm256_permutevar8x32_ps(width, decade));
    const __m256 edges = _mm256_add_ps(_mm256_fmadd_ps(range, place, end), _mm256_fmadd_ps(range, next, end));
    const __m256 value = _mm256_mul_ps(edges, _mm256_permutevar8x32_ps(half, decade));
    const __m256i is_zero = _mm256_cmpeq_epi32(from_zero, _mm256_setzero_si256());
    const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(from_zero), _mm256_set1_ps(-0.0f));
    *out = _mm256_andnot_ps(_mm256_castsi256_ps(is_zero), kSigned ? _mm256_or_ps(value, sign) : value);
  }

  // 8 values' magnitudes, and their lines.
  struct Placed8 {
    __m256i magnitude, line;
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
    __m256i unsure[4];
    const __m256i code[4] = {find(placed.a, values, unsure[0]), find(placed.b, values + 8, unsure[1]),
                             find(placed.c, values + 16, unsure[2]), find(placed.d, values + 24, unsure[3])};
    // The packs work inside 128-bit lanes, and saturate: there is no -1 among the signed codes.
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
    const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), ordered);
    const __m256i any = _mm256_or_si256(_mm256_or_si256(unsure[0], unsure[1]), _mm256_or_si256(unsure[2], unsure[3]));
    if (__builtin_expect(_mm256_movemask_epi8(any) != 0, 0)) {
      for (int i = 0; i < 32; i += 8) {
        const int lanes = _mm256_movemask_ps(_mm256_castsi256_ps(unsure[i / 8]));
        search(values + i, inverse, static_cast<unsigned>(lanes), codes + i);
      }
    }
  }

  // Those whose bits are set, as the format says.
  static void search(const float* values, float inverse, unsigned chosen, std::uint8_t* codes) {
    for (; chosen != 0; chosen &= chosen - 1) {
      const int i = __builtin_ctz(chosen);
      codes[i] = encode_dynamic(book().bound, values[i] * inverse);
    }
  }

  [[gnu::always_inline]] Placed8 place8(const float* values, float inverse) const {
    const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(values), _mm256_set1_ps(inverse));
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i magnitude = kSigned ? _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)) : bits;
    const __m256i upper = _mm256_max_epi32(_mm256_srli_epi32(magnitude, 16), _mm256_set1_epi32(Lines::kLeast));
    const __m256i line = _mm256_mulhi_epi16(upper, _mm256_set1_epi32(Lines::kLog));
    const __m256i sign = _mm256_srai_epi32(bits, 31);  // -1: negative
    const __m256i compared = kSigned ? _mm256_sub_epi32(_mm256_add_epi32(bits, bits), sign) : bits;
    const __m256i beyond = _mm256_cmpgt_epi32(compared, _mm256_permutevar8x32_epi32(end, line));
    return {magnitude, _mm256_sub_epi32(line, beyond)};
  }
  [[gnu::always_inline]] __m256i find(const Placed8& x, const float* values, __m256i& unsure) const {
    const __m256 on_line = _mm256_fmadd_ps(_mm256_castsi256_ps(x.magnitude), _mm256_permutevar8x32_ps(scale, x.line),
                                           _mm256_permutevar8x32_ps(offset, x.line));
    const __m256i sum = _mm256_min_epi32(_mm256_cvtps_epi32(on_line), _mm256_permutevar8x32_epi32(last, x.line));
    unsure = _mm256_cmpeq_epi32(_mm256_and_si256(sum, _mm256_set1_epi32(Lines::kSureMask)), _mm256_setzero_si256());
    const __m256i rank = _mm256_srli_epi32(sum, Lines::kFractionBits);
    if constexpr (!kSigned) return _mm256_and_si256(rank, _mm256_cmpgt_epi32(x.magnitude, _mm256_setzero_si256()));
    const __m256i sign = _mm256_srai_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), 31);
    const __m256i signed_rank = _mm256_sub_epi32(_mm256_xor_si256(rank, sign), sign);
    return _mm256_add_epi32(_mm256_set1_epi32(127), signed_rank);
  }
};

}  // namespace
}  // namespace qlora::cpu
