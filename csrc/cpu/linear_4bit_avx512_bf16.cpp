// linear_4bit for few rows, AVX512_BF16 and VBMI: 256 weights at a time. A word holds 4 codes; vpermw looks at the
// lowest 5 bits of each, so that with the codes written twice, shifts alone bring them there. Two vectors of 128
// weights exchange every other 8 bytes first: a lane then has 16 products of one block to add up before it must be
// scaled, not 8.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")

#include "dynamic_lookup_avx512_vbmi.h"
#include "linear_4bit_tiles_avx512.h"

namespace qlora::cpu {
namespace {

struct CodesBf16 {
  using Element = BFloat16;

  __m512i table;

  explicit CodesBf16(QuantType quant_type) : table(codes_in_bf16(quant_type)) {}

  // The i-th code of each word.
  __m512bh decode(__m512i words, int i) const {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, static_cast<unsigned>(4 * i)), table);
  }
};

// 8 bytes of the first vector, then 8 of the second.
constexpr int run_of_lane_in_turn(int lane) { return lane / 2 % 2 * 4 + lane / 4; }

struct Avx512Bf16 : SumsAvx512, CodesBf16 {
  static constexpr std::int64_t kChunk = 256;
  static constexpr int kMostRows = 2;  // of more, tiles are made, where W has the rows for one
  static constexpr int kRowsOfW = 2;
  static constexpr int kChains = 2;  // of dependent additions, to keep the units busy
  using Lanes = LanesAvx512<run_of_lane_in_turn>;
  using CodesBf16::CodesBf16;

  static constexpr int element(int i) {
    const int half = i / 128, nibble = i / 32 % 4, word = i % 32;
    const int vector = word / 4 % 2, byte = word / 8 * 16 + half * 8 + word % 4 * 2 + nibble / 2;
    return 128 * vector + 2 * byte + (nibble % 2 == 0);  // the low nibble is the odd element
  }

  template <int kRows>
  void multiply(const std::uint8_t* packed, std::int64_t stride, const BFloat16* x,
                Vector (&products)[kRowsOfW][kRows]) const {
    __m512i words[kRowsOfW][2];
    for (int r = 0; r < kRowsOfW; ++r) {
      const __m512i first = _mm512_loadu_si512(packed + r * stride),
                    second = _mm512_loadu_si512(packed + r * stride + 64);
      words[r][0] = _mm512_unpacklo_epi64(first, second);
      words[r][1] = _mm512_unpackhi_epi64(first, second);
    }
    Vector sums[kRowsOfW][kRows][kChains];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m512bh weights[kRowsOfW];
      for (int r = 0; r < kRowsOfW; ++r) weights[r] = decode(words[r][i / 4], i % 4);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto values = (__m512bh)_mm512_load_si512(x + m * kChunk + 32 * i);
        for (int r = 0; r < kRowsOfW; ++r) {
          Vector& sum = sums[r][m][i % kChains];
          sum = _mm512_dpbf16_ps(i < kChains ? Vector{} : sum, weights[r], values);
        }
      }
    }
    static_assert(kChains == 2);
    for (int r = 0; r < kRowsOfW; ++r) {
      for (int m = 0; m < kRows; ++m) products[r][m] = sums[r][m][0] + sums[r][m][1];
    }
  }
};

struct TileAvx512Bf16 : CodesBf16 {
  static constexpr int kFactors = 2;  // of a lane, in one step
  static constexpr int kShifts = 4;   // of a dword, each of which brings two codes to every lane
  using CodesBf16::CodesBf16;

  // Of 8 of x: the pairs that the shifts bring, in their order. The low nibble is the odd element.
  static __m128i in_order(__m128i x) {
    return _mm_shuffle_epi8(x, _mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
  }

  static __m512 multiply_add(__m512bh weights, const BFloat16* x, __m512 sum) {
    using Pair [[gnu::may_alias]] = std::int32_t;
    const auto& pair = *reinterpret_cast<const Pair*>(x);
#if defined(QLORA_EXT_EMULATED)
    return _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_set1_epi32(pair));
#else  // of the intrinsics GCC makes two instructions, which are 5 % slower
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(pair));
    return sum;
#endif
  }
};

}  // namespace

const FewRowsKernel& few_rows_avx512_bf16(std::int64_t M, std::int64_t N) {
  return pays_in_tiles(M, N) ? kInTiles<TileAvx512Bf16> : kAlongRows<Avx512Bf16>;
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
