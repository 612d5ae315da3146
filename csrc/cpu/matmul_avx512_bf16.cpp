// matmul for AVX512_BF16.
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "matmul_avx512_bf16.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 : PairsAvx512<Avx512Bf16> {
  static Vector product(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(b), (__m512bh)_mm512_castps_si512(a));
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
};

}  // namespace

const MatmulKernel matmul_avx512_bf16 = kMatmulKernel<Avx512Bf16>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
