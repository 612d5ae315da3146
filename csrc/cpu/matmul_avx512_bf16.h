// What the two kinds of matmul share that multiply pairs of bf16 along the reduction, AVX512_BF16 and AMX. A file of
// kernels includes this inside its target region.
//
// Places hold pairs in 32 bits, the element of even r in the low half: of x as it lies in memory, of the panel so that
// row r / 2 has the pairs of its columns. Weights are decoded in fp32 and rounded once, as dequantize_4bit does (but
// for subnormals, which are 0 here).
#include "matmul_avx512.h"

namespace qlora::cpu {
namespace {

template <typename Isa>
struct PairsAvx512 : Avx512Tiles<Isa> {
  using typename Avx512Tiles<Isa>::Vector;
  using Avx512Tiles<Isa>::kColumns;

  static constexpr std::int64_t kPerStep = 2;
  // The whole depth: beside the rounding of x, W and out to bf16 the errors of longer chains do not show.
  static constexpr std::int64_t kChain = kDepth / kPerStep;

  static Vector places(const BFloat16* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); }

  template <typename T>
  static Vector places(const T* from) {
    const __m256i low = round16(load16(from), BFloat16{}), high = round16(load16(from + 16), BFloat16{});
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }

  static void store_rows(__m512 even, __m512 odd, std::int64_t r, float* panel) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // words 0 to 15 are even's
    _mm512_storeu_si512(panel + r / 2 * kColumns, _mm512_permutexvar_epi16(words_in_turn(), halves));
  }

  // Two of W's rows at a time. The 16 weights that a block may have of each are made once, and looked up by codes: a
  // column's is one of the first row's, then one of the second's. (After the last of an odd number of rows comes one
  // with an absmax of 0.) All is ready a step before it is looked up: lookups that wait would fill the units' queues.
  // Not inlined, so that nothing of the loops around it takes registers.
  [[gnu::noinline]] static void fill_weight(QuantType quant_type, const MatmulScratch& s, std::int64_t column,
                                            std::int64_t depth) {
    const __m512 table = _mm512_loadu_ps(codebook(quant_type).value);
    const float* absmax = s.absmax + column / kStep * kDepth;
    const std::uint8_t* packed = s.packed + column / 2;
    const __m512i first = words_with_codes(0), second = words_with_codes(16), shifts = shifts_of_codes();
    const __m512i code = _mm512_set1_epi16(0xf), second_row = _mm512_set1_epi32(0x100000);
    __m512i weights, codes[2];
    const auto prepare = [&](std::int64_t r) __attribute__((always_inline)) {
      weights = (__m512i)_mm512_cvtne2ps_pbh(table * _mm512_set1_ps(absmax[r + 1]), table * _mm512_set1_ps(absmax[r]));
      const auto load = [&](std::int64_t row) __attribute__((always_inline)) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + row * kStagedBytes));
      };
      const __m512i words = _mm512_castsi256_si512(_mm256_set_m128i(load(r + 1), load(r)));
      const auto each = [&](__m512i of_column) __attribute__((always_inline)) {
        const __m512i moved = _mm512_srlv_epi16(_mm512_permutexvar_epi16(of_column, words), shifts);
        return _mm512_ternarylogic_epi32(moved, code, second_row, 0xea);  // moved & code | second_row
      };
      codes[0] = each(first);
      codes[1] = each(second);
    };
    prepare(0);
    for (std::int64_t r = 0; r < depth; r += 2) {
      const __m512i pairs[2] = {_mm512_permutexvar_epi16(codes[0], weights),
                                _mm512_permutexvar_epi16(codes[1], weights)};
      if (r + 2 < depth) prepare(r + 2);
      float* to = s.panel + r / 2 * kColumns;
      _mm512_storeu_si512(to, pairs[0]);
      _mm512_storeu_si512(to + 16, pairs[1]);
    }
  }

  // Of 16 columns from this one on, the words of 16 bytes of two rows that have their codes: word 2 i is column i's of
  // the first row, word 2 i + 1 of the second.
  static __m512i words_with_codes(int column) {
    std::uint16_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = static_cast<std::uint16_t>(i % 2 * 8 + (column + i / 2) / 4);
    return _mm512_loadu_si512(words);
  }

  // How far these lie above the lowest bits of their words.
  static __m512i shifts_of_codes() {
    std::uint16_t shifts[32];
    for (int i = 0; i < 32; ++i) shifts[i] = static_cast<std::uint16_t>(nibble_shift(i / 2 % 4));
    return _mm512_loadu_si512(shifts);
  }
};

}  // namespace
}  // namespace qlora::cpu
