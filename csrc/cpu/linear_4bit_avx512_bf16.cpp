// linear_4bit for few rows, AVX512_BF16: 128 weights of 64 bytes at a time. A word holds 4 codes; vpermw looks at the
// lowest 5 bits of each, so that with the codes written twice, shifts alone bring them there.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "linear_4bit_loops.h"
#include "sums_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 : SumsAvx512 {
  static constexpr std::int64_t kChunk = 128;
  using Element = BFloat16;
  struct Weights {
    __m512i nibble[4];  // [i]: nibble i of each word, the lowest first
  };

  __m512i table;

  explicit Avx512Bf16(QuantType quant_type) {
    std::uint16_t words[2 * kNumCodes];
    for (int i = 0; i < 2 * kNumCodes; ++i) {
      const int code = i % kNumCodes;
      words[i] = round_code<BFloat16>(quant_type, code, codebook(quant_type).value[code]).bits;
    }
    table = _mm512_loadu_si512(words);
  }

  Weights decode(const std::uint8_t* packed) const {
    const __m512i words = _mm512_loadu_si512(packed);
    Weights weights;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) weights.nibble[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), table);
    return weights;
  }

  static Vector dot(const Weights& weights, const BFloat16* x) {
    Vector sums = zero();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sums = _mm512_dpbf16_ps(sums, (__m512bh)weights.nibble[i], (__m512bh)_mm512_load_si512(x + 32 * i));
    }
    return sums;
  }
};

}  // namespace

Arrangement arrangement_avx512_bf16() {
  Arrangement arrangement{Avx512Bf16::kChunk, DType::BFloat16, {}};
  for (int i = 0; i < Avx512Bf16::kChunk; ++i) {
    const int nibble = i / 32, word = i % 32, byte = 2 * word + nibble / 2;
    arrangement.order[i] =
        static_cast<std::uint8_t>(2 * byte + (nibble % 2 == 0));  // the low nibble is the odd element
  }
  return arrangement;
}

void linear_4bit_avx512_bf16(const FewRows& product, std::int64_t begin, std::int64_t end) {
  multiply_few_rows<Avx512Bf16>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
