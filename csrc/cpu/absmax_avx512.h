// Absmax as numbers, for the AVX512 kernels. A file of kernels includes this inside its target region.
namespace qlora::cpu {
namespace {

// The halves of the codebook's values, as there is a lookup of 64 words and none of 64 floats.
struct DynamicHalves {
  alignas(64) std::uint16_t low[256], high[256];
};

constexpr DynamicHalves halve_dynamic_codebook() {
  DynamicHalves halves{};
  for (int code = 0; code < 256; ++code) {
    const auto bits = __builtin_bit_cast(std::uint32_t, kDynamicCodebook.value[code]);
    halves.low[code] = static_cast<std::uint16_t>(bits);
    halves.high[code] = static_cast<std::uint16_t>(bits >> 16);
  }
  return halves;
}

inline __m512i look_up_words(const std::uint16_t* table, __m512i codes) {
  __m512i found[4];
  for (int i = 0; i < 4; ++i) {
    found[i] =
        _mm512_permutex2var_epi16(_mm512_load_si512(table + 64 * i), codes, _mm512_load_si512(table + 64 * i + 32));
  }
  const __mmask32 bit6 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
  const __mmask32 bit7 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
  return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, found[0], found[1]),
                                 _mm512_mask_blend_epi16(bit6, found[2], found[3]));
}

// Those of `count` blocks from `first` on, and zeros up to a multiple of 32 of them.
inline void decode_absmax_avx512(const Packed4bit& w, std::int64_t first, std::int64_t count, float* absmax) {
  static constexpr DynamicHalves kHalves = halve_dynamic_codebook();
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undone by unpacking
  if (w.nested_absmax == nullptr) {
    __builtin_memset(absmax, 0, static_cast<std::size_t>((count + 31) / 32 * 32) * sizeof(float));
    __builtin_memcpy(absmax, static_cast<const float*>(w.absmax) + first,
                     static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < count; i += 32) {
    const std::uint32_t present = count - i < 32 ? (1u << (count - i)) - 1 : ~0u;
    const auto low = static_cast<__mmask16>(present), high = static_cast<__mmask16>(present >> 16);
    std::uint8_t some[32] = {};
    const std::uint8_t* from = static_cast<const std::uint8_t*>(w.absmax) + first + i;
    if (count - i < 32) {
      __builtin_memcpy(some, from, static_cast<std::size_t>(count - i));
      from = some;
    }
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, order));
    const __m512i lows = look_up_words(kHalves.low, codes), highs = look_up_words(kHalves.high, codes);
    const __m512 values[2] = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(lows, highs)),
                              _mm512_castsi512_ps(_mm512_unpackhi_epi16(lows, highs))};
    // Of one group, or of two.
    const std::int64_t group = (first + i) / kNestedBlocksize, rest = (group + 1) * kNestedBlocksize - (first + i);
    const std::uint32_t of_next = rest < 32 ? ~0u << rest & present : 0;
    const __m512 scale = _mm512_set1_ps(w.nested_absmax[group]);
    const __m512 next = _mm512_set1_ps(w.nested_absmax[of_next == 0 ? group : group + 1]);
    const __m512 offset = _mm512_set1_ps(*w.nested_offset);
    const auto decode = [&](__m512 value, __mmask16 mask, std::uint32_t of_next_half) {
      const __m512 nested = _mm512_mask_blend_ps(static_cast<__mmask16>(of_next_half), scale, next);
      return _mm512_maskz_add_ps(mask, _mm512_mul_ps(value, nested), offset);
    };
    _mm512_storeu_ps(absmax + i, decode(values[0], low, of_next));
    _mm512_storeu_ps(absmax + i + 16, decode(values[1], high, of_next >> 16));
  }
}

}  // namespace
}  // namespace qlora::cpu
