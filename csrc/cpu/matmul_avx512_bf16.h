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

  // Of words of 4 codes, how far above the lowest bits those of 16 columns lie, of two rows in turn.
  static __m512i shifts_of_codes() {
    std::uint16_t shifts[32];
    for (int i = 0; i < 32; ++i) shifts[i] = static_cast<std::uint16_t>(nibble_shift(i / 2 % 4));
    return _mm512_loadu_si512(shifts);
  }
};

}  // namespace
}  // namespace qlora::cpu
