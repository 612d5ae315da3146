// What the two kinds of matmul share on AVX512: tiles of 12 rows x 32 columns, 24 sums in 24 registers. A file of
// kernels includes this inside its target region.
//
// Isa adds
//   product     of a number, or pair, of x and those of 16 columns, onto their sums
//   store_rows  fp32 values of 16 columns of the panel, of rows r and r + 1; r is even
#include "matmul_loops.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

template <typename Isa>
struct Avx512Tiles : Avx512Vectors, VectorTiles {
  static constexpr std::int64_t kColumns = 32;
  static constexpr int kTileRows = 12;

  static void store_first(float* to, Vector x, std::int64_t lanes) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << lanes) - 1), x);
  }

  template <typename T>
  static void store_panel_rows(const T* even, const T* odd, std::int64_t r, float* panel) {
    for (int q = 0; q < 32; q += 16) Isa::store_rows(load16(even + q), load16(odd + q), r, panel + q);
  }

  // 64 bytes of 16 of W's rows, the panel's columns, are transposed: of each dword, 8 codes, all columns lie side by
  // side then.
  static void fill_weight_transposed(QuantType quant_type, const MatmulScratch& s, std::int64_t depth) {
    constexpr std::int64_t kCodes = 8;
    const __m512 table = _mm512_loadu_ps(codebook(quant_type).value);
    const auto decode = [&](__m512i codes, int shift, __m512 absmax) {
      return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(shift)), table) * absmax;
    };
    for (std::int64_t half = 0; half < kColumns; half += 16) {
      for (std::int64_t begin = 0; begin < depth; begin += kLanes * kCodes) {
        Vector dwords[kLanes];
        const std::uint8_t* packed = s.packed + half * kStagedBytes + begin / 2;
        for (std::int64_t i = 0; i < kLanes; ++i) dwords[i] = _mm512_loadu_ps(packed + i * kStagedBytes);
        transpose(dwords);
        const std::int64_t end = smaller(depth, begin + kLanes * kCodes);
        for (std::int64_t r = begin; r < end; r += kCodes) {
          const __m512i codes = _mm512_castps_si512(dwords[(r - begin) / kCodes]);
          const __m512 absmax = _mm512_loadu_ps(s.absmax + r / kStep * kDepth + half);
#pragma GCC unroll 4
          for (int i = 0; i < kCodes; i += 2) {
            Isa::store_rows(decode(codes, nibble_shift(i), absmax), decode(codes, nibble_shift(i + 1), absmax), r + i,
                            s.panel + half);
          }
        }
      }
    }
  }

  // A function of its own for the reason that matmul_avx2.cpp tells.
  template <int kRows>
  [[gnu::noinline]] static void multiply_tile(const float* x, const float* panel, std::int64_t steps, float* sums) {
    __m512 sum[kRows][2];
    for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (std::int64_t step = 0; step < steps; ++step, panel += kColumns) {
      const __m512 b0 = _mm512_loadu_ps(panel), b1 = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const __m512 a = _mm512_set1_ps(x[step * kRows + i]);
        sum[i][0] = Isa::product(a, b0, sum[i][0]);
        sum[i][1] = Isa::product(a, b1, sum[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i, sums += kColumns) {
      _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sum[i][0]));
      _mm512_storeu_ps(sums + 16, _mm512_add_ps(_mm512_loadu_ps(sums + 16), sum[i][1]));
    }
  }
};

}  // namespace
}  // namespace qlora::cpu
