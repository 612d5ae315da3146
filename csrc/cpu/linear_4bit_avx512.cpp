// linear_4bit for few rows, AVX512: 128 weights of 64 bytes at a time, in fp32. A dword holds 8 codes; vpermps looks at
// the lowest 4 bits of each, so that shifts alone bring them there.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "linear_4bit_loops.h"
#include "sums_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 : SumsAvx512 {
  static constexpr std::int64_t kChunk = 128;
  using Element = float;
  struct Weights {
    __m512 nibble[8];  // [i]: nibble i of each dword, the lowest first
  };

  __m512 table;

  explicit Avx512(QuantType quant_type) : table(_mm512_loadu_ps(codebook(quant_type).value)) {}

  Weights decode(const std::uint8_t* packed) const {
    const __m512i dwords = _mm512_loadu_si512(packed);
    Weights weights;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) weights.nibble[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(dwords, 4 * i), table);
    return weights;
  }

  static Vector dot(const Weights& weights, const float* x) {
    Vector even = _mm512_mul_ps(weights.nibble[0], _mm512_load_ps(x));
    Vector odd = _mm512_mul_ps(weights.nibble[1], _mm512_load_ps(x + 16));
#pragma GCC unroll 3
    for (int i = 2; i < 8; i += 2) {
      even = _mm512_fmadd_ps(weights.nibble[i], _mm512_load_ps(x + 16 * i), even);
      odd = _mm512_fmadd_ps(weights.nibble[i + 1], _mm512_load_ps(x + 16 * i + 16), odd);
    }
    return _mm512_add_ps(even, odd);
  }
};

}  // namespace

Arrangement arrangement_avx512() {
  Arrangement arrangement{Avx512::kChunk, DType::Float32, {}};
  for (int i = 0; i < Avx512::kChunk; ++i) {
    const int nibble = i / 16, dword = i % 16, byte = 4 * dword + nibble / 2;
    arrangement.order[i] =
        static_cast<std::uint8_t>(2 * byte + (nibble % 2 == 0));  // the low nibble is the odd element
  }
  return arrangement;
}

void linear_4bit_avx512(const FewRows& product, std::int64_t begin, std::int64_t end) {
  multiply_few_rows<Avx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
