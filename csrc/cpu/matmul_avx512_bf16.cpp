// matmul for AVX512_BF16: pairs of bf16 along the reduction.
//
// Places hold pairs in 32 bits, the element of even r in the low half: of x as it lies in memory, of the panel so that
// row r / 2 has the pairs of its columns. Weights are decoded in fp32 and rounded once, as dequantize_4bit does (but
// for subnormals, which are 0 here).
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "matmul_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 : Avx512Tiles<Avx512Bf16> {
  static constexpr std::int64_t kPerStep = 2;
  // The whole depth: beside the rounding of x, W and out to bf16 the errors of longer chains do not show.
  static constexpr std::int64_t kChain = kDepth / kPerStep;

  static Vector places(const BFloat16* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); }

  template <typename T>
  static Vector places(const T* from) {
    const __m256i low = round16(load16(from), BFloat16{}), high = round16(load16(from + 16), BFloat16{});
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }

  static Vector product(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(b), (__m512bh)_mm512_castps_si512(a));
  }

  static void store_rows(__m512 even, __m512 odd, std::int64_t r, float* panel) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // words 0 to 15 are even's
    _mm512_storeu_si512(panel + r / 2 * kColumns, _mm512_permutexvar_epi16(words_in_turn(), halves));
  }

  // 16 bytes of two of W's rows at a time: even columns are the high nibbles. After the last of an odd number of rows
  // comes one with an absmax of 0.
  static void fill_weight(QuantType quant_type, const MatmulScratch& s, std::int64_t column, std::int64_t depth) {
    const __m512 table = _mm512_loadu_ps(codebook(quant_type).value);
    const float* absmax = s.absmax + column / kStep * kDepth;
    const std::uint8_t* packed = s.packed + column / 2;
    const auto decode = [&](const std::uint8_t* bytes, float scale, __m512& even, __m512& odd) {
      const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table), _mm512_set1_ps(scale));
      odd = _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), _mm512_set1_ps(scale));
    };
    // Column 2j has word j of the even columns for row r and word 16 + j for row r + 1; then the same of the odd ones.
    const __m512i first = pairs_of(0), second = pairs_of(8);
    for (std::int64_t r = 0; r < depth; r += 2, packed += 2 * kStagedBytes) {
      __m512 even[2], odd[2];
      decode(packed, absmax[r], even[0], odd[0]);
      decode(packed + kStagedBytes, absmax[r + 1], even[1], odd[1]);
      const auto evens = (__m512i)_mm512_cvtne2ps_pbh(even[1], even[0]),
                 odds = (__m512i)_mm512_cvtne2ps_pbh(odd[1], odd[0]);
      float* to = s.panel + r / 2 * kColumns;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(evens, first, odds));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(evens, second, odds));
    }
  }

  // Of two vectors, a and b, the words j, 16 + j of a, the same of b, j + 1, 17 + j of a, and so on.
  static __m512i pairs_of(int j) {
    std::uint16_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = static_cast<std::uint16_t>(j + i / 4 + i % 2 * 16 + i / 2 % 2 * 32);
    return _mm512_loadu_si512(words);
  }
};

}  // namespace

const MatmulKernel matmul_avx512_bf16 = kMatmulKernel<Avx512Bf16>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
