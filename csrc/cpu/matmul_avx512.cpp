// matmul for AVX512, in fp32: tiles of 12 rows x 32 columns, 24 sums in 24 registers.
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "matmul_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 : Avx512Tiles {
  // Rounding errors of longer chains would grow beyond those of torch's kernels.
  static constexpr std::int64_t kChain = 64;
  static constexpr std::int64_t kPerStep = 1;

  template <typename T>
  static Vector places(const T* from) {
    return load16(from);
  }

  template <typename T>
  static void store_panel_rows(const T* even, const T* odd, std::int64_t r, float* panel) {
    float* to = panel + r * kColumns;
    for (int q = 0; q < 2; ++q) _mm512_storeu_ps(to + 16 * q, load16(even + 16 * q));
    for (int q = 0; q < 2; ++q) _mm512_storeu_ps(to + kColumns + 16 * q, load16(odd + 16 * q));
  }

  // 16 bytes of 16 of W's rows are transposed, to get 16 columns' bytes side by side.
  static void fill_weight_transposed(QuantType quant_type, const MatmulScratch& s, std::int64_t depth) {
    const __m512 table = _mm512_loadu_ps(codebook(quant_type).value);
    for (std::int64_t half = 0; half < kColumns; half += 16) {
      for (std::int64_t r = 0; r < depth; r += 32) {
        const __m512 absmax = _mm512_loadu_ps(s.absmax + r / kStep * kDepth + half);
        __m128i bytes[16];
        transpose_bytes(s.packed + half * kStagedBytes + r / 2, kStagedBytes, bytes);
        float* to = s.panel + r * kColumns + half;
        for (int i = 0; i < 16; ++i, to += 2 * kColumns) {
          const __m512i low = _mm512_cvtepu8_epi32(bytes[i]), high = _mm512_srli_epi32(low, 4);
          _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_permutexvar_ps(high, table), absmax));
          _mm512_storeu_ps(to + kColumns, _mm512_mul_ps(_mm512_permutexvar_ps(low, table), absmax));
        }
      }
    }
  }

  static void fill_weight(QuantType quant_type, const MatmulScratch& s, std::int64_t column, std::int64_t depth) {
    const __m512 table = _mm512_loadu_ps(codebook(quant_type).value);
    for (std::int64_t half = 0; half < kColumns; half += 16) {
      const float* absmax = s.absmax + (column + half) / kStep * kDepth;
      const std::uint8_t* packed = s.packed + (column + half) / 2;
      for (std::int64_t r = 0; r < depth; ++r, packed += kStagedBytes) {
        const __m512 codes = _mm512_permutexvar_ps(indices(packed), table);
        _mm512_storeu_ps(s.panel + r * kColumns + half, _mm512_mul_ps(codes, _mm512_set1_ps(absmax[r])));
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
        sum[i][0] = _mm512_fmadd_ps(a, b0, sum[i][0]);
        sum[i][1] = _mm512_fmadd_ps(a, b1, sum[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i, sums += kSumStride) {
      _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sum[i][0]));
      _mm512_storeu_ps(sums + 16, _mm512_add_ps(_mm512_loadu_ps(sums + 16), sum[i][1]));
    }
  }
};

}  // namespace

const MatmulKernel matmul_avx512 = kMatmulKernel<Avx512>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
