// linear_4bit for few rows, AVX512: 128 weights of 64 bytes at a time, in fp32. A dword holds 8 codes; vpermps looks at
// the lowest 4 bits of each, so that shifts alone bring them there.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "dynamic_lookup_avx512.h"
#include "linear_4bit_tiles_avx512.h"

namespace qlora::cpu {
namespace {

struct CodesFp32 {
  using Element = float;

  __m512 table;

  explicit CodesFp32(QuantType quant_type) : table(_mm512_loadu_ps(codebook(quant_type).value)) {}

  // The i-th code of each dword.
  __m512 decode(__m512i dwords, int i) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(dwords, static_cast<unsigned>(4 * i)), table);
  }
};

struct Avx512 : SumsAvx512, CodesFp32 {
  static constexpr std::int64_t kChunk = 128;
  static constexpr int kMostRows = 2;  // of more, tiles are made, where W has the rows for one
  static constexpr int kRowsOfW = 2;
  static constexpr int kChains = 2;  // of dependent additions, to keep the units busy
  using Lanes = LanesAvx512<>;
  using CodesFp32::CodesFp32;

  static constexpr int element(int i) {
    const int nibble = i / 16, dword = i % 16, byte = 4 * dword + nibble / 2;
    return 2 * byte + (nibble % 2 == 0);  // the low nibble is the odd element
  }

  template <int kRows>
  void multiply(const std::uint8_t* packed, std::int64_t stride, const float* x,
                Vector (&products)[kRowsOfW][kRows]) const {
    __m512i dwords[kRowsOfW];
    for (int r = 0; r < kRowsOfW; ++r) dwords[r] = _mm512_loadu_si512(packed + r * stride);
    Vector sums[kRowsOfW][kRows][kChains];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Vector weights[kRowsOfW];
      for (int r = 0; r < kRowsOfW; ++r) weights[r] = decode(dwords[r], i);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vector values = _mm512_load_ps(x + m * kChunk + 16 * i);
        for (int r = 0; r < kRowsOfW; ++r) {
          Vector& sum = sums[r][m][i % kChains];
          sum = i < kChains ? _mm512_mul_ps(weights[r], values) : _mm512_fmadd_ps(weights[r], values, sum);
        }
      }
    }
    static_assert(kChains == 2);
    for (int r = 0; r < kRowsOfW; ++r) {
      for (int m = 0; m < kRows; ++m) products[r][m] = sums[r][m][0] + sums[r][m][1];
    }
  }
};

struct TileAvx512 : CodesFp32 {
  static constexpr int kFactors = 1;  // of a lane, in one step
  static constexpr int kShifts = 8;   // of a dword, each of which brings a code to every lane
  using CodesFp32::CodesFp32;

  // Of 4 of x: what the shifts bring, in their order.
  static __m128i in_order(__m128i x) { return _mm_shuffle_epi32(x, 0b10110001); }

  static __m512 multiply_add(__m512 weights, const float* x, __m512 sum) {
    return _mm512_fmadd_ps(weights, _mm512_set1_ps(*x), sum);
  }
};

}  // namespace

const FewRowsKernel& few_rows_avx512(std::int64_t M, std::int64_t N) {
  return pays_in_tiles(M, N) ? kInTiles<TileAvx512> : kAlongRows<Avx512>;
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
