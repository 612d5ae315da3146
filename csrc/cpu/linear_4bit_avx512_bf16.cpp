// linear_4bit for few rows, AVX512_BF16: 256 weights at a time. A word holds 4 codes; vpermw looks at the lowest 5 bits
// of each, so that with the codes written twice, shifts alone bring them there. Two vectors of 128 weights exchange
// every other 8 bytes first: a lane then has 16 products of one block to add up before it must be scaled, not 8.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "linear_4bit_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 : SumsAvx512 {
  static constexpr std::int64_t kChunk = 256;
  static constexpr int kRowsOfW = 2;
  static constexpr int kChains = 2;  // of dependent additions, to keep the units busy
  using Element = BFloat16;
  using Lanes = LanesAvx512<Avx512Bf16>;

  __m512i table;

  explicit Avx512Bf16(QuantType quant_type) {
    std::uint16_t words[2 * kNumCodes];
    for (int i = 0; i < 2 * kNumCodes; ++i) {
      const int code = i % kNumCodes;
      words[i] = round_code<BFloat16>(quant_type, code, codebook(quant_type).value[code]).bits;
    }
    table = _mm512_loadu_si512(words);
  }

  // 8 bytes of the first vector, then 8 of the second.
  static int run_of_lane(int lane) { return lane / 2 % 2 * 4 + lane / 4; }

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
      __m512i weights[kRowsOfW];
      for (int r = 0; r < kRowsOfW; ++r) {
        weights[r] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[r][i / 4], 4 * (i % 4)), table);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto values = (__m512bh)_mm512_load_si512(x + m * kChunk + 32 * i);
        for (int r = 0; r < kRowsOfW; ++r) {
          Vector& sum = sums[r][m][i % kChains];
          sum = _mm512_dpbf16_ps(i < kChains ? zero() : sum, (__m512bh)weights[r], values);
        }
      }
    }
    for (int r = 0; r < kRowsOfW; ++r) {
      for (int m = 0; m < kRows; ++m) {
        products[r][m] = sums[r][m][0] + sums[r][m][1];
      }
    }
  }
};

constexpr Arrangement make_arrangement() {
  Arrangement arrangement{Avx512Bf16::kChunk, DType::BFloat16, {}};
  for (int i = 0; i < Avx512Bf16::kChunk; ++i) {
    const int half = i / 128, nibble = i / 32 % 4, word = i % 32;
    const int vector = word / 4 % 2, byte = word / 8 * 16 + half * 8 + word % 4 * 2 + nibble / 2;
    // The low nibble is the odd element.
    arrangement.order[i] = static_cast<std::uint8_t>(128 * vector + 2 * byte + (nibble % 2 == 0));
  }
  return arrangement;
}

}  // namespace

const Arrangement& arrangement_avx512_bf16() {
  static constexpr Arrangement kArrangement = make_arrangement();
  return kArrangement;
}

void linear_4bit_avx512_bf16(const FewRows& product, std::int64_t begin, std::int64_t end) {
  multiply_few_rows<Avx512Bf16>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
