// linear_4bit for few rows, AVX512: 128 weights of 64 bytes at a time, in fp32. A dword holds 8 codes; vpermps looks at
// the lowest 4 bits of each, so that shifts alone bring them there.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "linear_4bit_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 : SumsAvx512 {
  static constexpr std::int64_t kChunk = 128;
  static constexpr int kRowsOfW = 2;
  static constexpr int kChains = 2;  // of dependent additions, to keep the units busy
  using Element = float;
  using Lanes = LanesAvx512<Avx512>;

  __m512 table;

  explicit Avx512(QuantType quant_type) : table(_mm512_loadu_ps(codebook(quant_type).value)) {}

  static int run_of_lane(int lane) { return lane / 4; }

  template <int kRows>
  void multiply(const std::uint8_t* packed, std::int64_t stride, const float* x,
                Vector (&products)[kRowsOfW][kRows]) const {
    __m512i dwords[kRowsOfW];
    for (int r = 0; r < kRowsOfW; ++r) dwords[r] = _mm512_loadu_si512(packed + r * stride);
    Vector sums[kRowsOfW][kRows][kChains];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Vector weights[kRowsOfW];
      for (int r = 0; r < kRowsOfW; ++r) {
        weights[r] = _mm512_permutexvar_ps(_mm512_srli_epi32(dwords[r], 4 * i), table);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vector values = _mm512_load_ps(x + m * kChunk + 16 * i);
        for (int r = 0; r < kRowsOfW; ++r) {
          Vector& sum = sums[r][m][i % kChains];
          sum = i < kChains ? _mm512_mul_ps(weights[r], values) : _mm512_fmadd_ps(weights[r], values, sum);
        }
      }
    }
    for (int r = 0; r < kRowsOfW; ++r) {
      for (int m = 0; m < kRows; ++m) products[r][m] = sums[r][m][0] + sums[r][m][1];
    }
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
