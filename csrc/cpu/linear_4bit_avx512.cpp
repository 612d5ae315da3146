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
  using Lanes = LanesAvx512<Avx512>;

  __m512 table;

  explicit Avx512(QuantType quant_type) : table(_mm512_loadu_ps(codebook(quant_type).value)) {}

  static int run_of_lane(int lane) { return lane / 4; }

  template <int kRows>
  void multiply(const std::uint8_t* packed, const float* x, Vector* products) const {
    constexpr int kChains = kRows <= 4 ? 2 : 1;  // of dependent additions, to keep the units busy
    const __m512i dwords = _mm512_loadu_si512(packed);
    Vector sums[kRows][kChains];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Vector weights = _mm512_permutexvar_ps(_mm512_srli_epi32(dwords, 4 * i), table);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vector values = _mm512_load_ps(x + m * kChunk + 16 * i);
        Vector& sum = sums[m][i % kChains];
        sum = i < kChains ? _mm512_mul_ps(weights, values) : _mm512_fmadd_ps(weights, values, sum);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) products[m] = kChains == 1 ? sums[m][0] : sums[m][0] + sums[m][kChains - 1];
  }
};

constexpr Arrangement make_arrangement() {
  Arrangement arrangement{Avx512::kChunk, DType::Float32, {}};
  for (int i = 0; i < Avx512::kChunk; ++i) {
    const int nibble = i / 16, dword = i % 16, byte = 4 * dword + nibble / 2;
    arrangement.order[i] =
        static_cast<std::uint8_t>(2 * byte + (nibble % 2 == 0));  // the low nibble is the odd element
  }
  return arrangement;
}

}  // namespace

const Arrangement& arrangement_avx512() {
  static constexpr Arrangement kArrangement = make_arrangement();
  return kArrangement;
}

void linear_4bit_avx512(const FewRows& product, std::int64_t begin, std::int64_t end) {
  multiply_few_rows<Avx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
