// matmul for AVX2 and FMA, in fp32: tiles of 6 rows x 16 columns, 12 sums in 12 registers.
//
// A code is looked up by vpshufb, a byte plane of the fp32 codebook at a time, and the four planes are interleaved: 14
// instructions decode 32 weights, against 20 by vpermps, which takes two lookups and a blend for 8.
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "matmul_loops.h"
#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

// 16 rows of 16 bytes to 16 columns, two in each register. Rows 0-3 and 8-11 are in the lower halves, 4-7 and 12-15 in
// the upper ones, so that the floats of a column's bytes, expanded within the halves, are in order. Each round
// interleaves row i with row i + 4 of a half's 8, which moves the highest bit of the row's number to the lowest of the
// column's: after three rounds they have changed places.
inline void transpose_bytes(const std::uint8_t* from, std::int64_t stride, __m256i (&columns)[8]) {
  for (int i = 0; i < 8; ++i) {
    const auto load = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + row * stride)); };
    const int row = i < 4 ? i : i + 4;
    columns[i] = _mm256_set_m128i(load(row + 4), load(row));
  }
  for (int round = 0; round < 3; ++round) {
    __m256i next[8];
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = _mm256_unpacklo_epi8(columns[i], columns[i + 4]);
      next[2 * i + 1] = _mm256_unpackhi_epi8(columns[i], columns[i + 4]);
    }
    for (int i = 0; i < 8; ++i) columns[i] = next[i];
  }
}

struct Avx2 : Avx2Vectors, VectorTiles {
  static constexpr std::int64_t kColumns = 16;
  // Rounding errors of longer chains would grow beyond those of torch's kernels.
  static constexpr std::int64_t kChain = 64;
  static constexpr std::int64_t kPerStep = 1;
  static constexpr int kTileRows = 6;

  template <typename T>
  static Vector places(const T* from) {
    return load8(from);
  }

  static void store_first(float* to, Vector x, std::int64_t lanes) {
    float values[kLanes];
    _mm256_storeu_ps(values, x);
    for (std::int64_t i = 0; i < lanes; ++i) to[i] = values[i];
  }

  template <typename T>
  static void store_panel_rows(const T* even, const T* odd, std::int64_t r, float* panel) {
    float* to = panel + r * kColumns;
    for (int q = 0; q < 2; ++q) _mm256_storeu_ps(to + 8 * q, load8(even + 8 * q));
    for (int q = 0; q < 2; ++q) _mm256_storeu_ps(to + kColumns + 8 * q, load8(odd + 8 * q));
  }

  // Two rows of 16 columns, from their codes: in each half of the register 8 of the first row and 8 of the second, in
  // the lower half columns 0-3 and 8-11. Both rows have their scales by 8 columns.
  static void store_weights(const Planes& planes, __m256i codes, const __m256 (&scales)[2][2], float* to,
                            std::int64_t second_row) {
    __m256 values[4];
    expand(planes, codes, values);
    for (int row = 0; row < 2; ++row, to += second_row) {
      for (int q = 0; q < 2; ++q) _mm256_storeu_ps(to + 8 * q, _mm256_mul_ps(values[2 * row + q], scales[row][q]));
    }
  }

  // 16 bytes of 16 of W's rows are transposed, to get 16 columns' bytes side by side.
  static void fill_weight_transposed(QuantType quant_type, const MatmulScratch& s, std::int64_t depth) {
    const Planes planes(quant_type);
    const __m256i nibble = _mm256_set1_epi8(0xf);
    for (std::int64_t r = 0; r < depth; r += 32) {
      const float* absmax = s.absmax + r / kStep * kDepth;
      const __m256 low_columns = _mm256_loadu_ps(absmax), high_columns = _mm256_loadu_ps(absmax + 8);
      const __m256 scales[2][2] = {{low_columns, high_columns}, {low_columns, high_columns}};
      __m256i bytes[8];  // each of four of the panel's rows: two columns of bytes
      transpose_bytes(s.packed + r / 2, kStagedBytes, bytes);
      for (int i = 0; i < 8; ++i) {
        float* to = s.panel + (r + 4 * i) * kColumns;
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), nibble);
        store_weights(planes, high, scales, to, 2 * kColumns);
        store_weights(planes, _mm256_and_si256(bytes[i], nibble), scales, to + kColumns, 2 * kColumns);
      }
    }
  }

  // Two of W's rows at a time, 8 bytes of each; after the last of an odd number comes one of zeros.
  static void fill_weight(QuantType quant_type, const MatmulScratch& s, std::int64_t column, std::int64_t depth) {
    const Planes planes(quant_type);
    const __m128i nibble = _mm_set1_epi8(0xf);
    const __m128i even_words_first = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    for (std::int64_t r = 0; r < depth; r += 2) {
      const std::uint8_t* first = s.packed + r * kStagedBytes + column / 2;
      const __m128i rows = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)),
                                              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first + kStagedBytes)));
      const __m128i bytes = _mm_shuffle_epi8(rows, even_words_first);
      const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
      const __m128i low = _mm_and_si128(bytes, nibble);
      const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
      const float* absmax = s.absmax + column / kStep * kDepth + r;
      const __m256 scale = _mm256_broadcast_ss(absmax), next = _mm256_broadcast_ss(absmax + 1);
      store_weights(planes, codes, {{scale, scale}, {next, next}}, s.panel + r * kColumns, kColumns);
    }
  }

  // Inlined into the loops over tiles, GCC 12 keeps half of the sums on the stack, at half the speed (so with -fwrapv).
  template <int kRows>
  [[gnu::noinline]] static void multiply_tile(const float* x, const float* panel, std::int64_t steps, float* sums) {
    __m256 sum[kRows][2];
    for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
#pragma GCC unroll 4  // where two threads of a core take turns, instructions count, not multiplications alone
    for (std::int64_t step = 0; step < steps; ++step, panel += kColumns) {
      const __m256 b0 = _mm256_loadu_ps(panel), b1 = _mm256_loadu_ps(panel + 8);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256 a = _mm256_broadcast_ss(x + step * kRows + i);
        sum[i][0] = _mm256_fmadd_ps(a, b0, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(a, b1, sum[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i, sums += kColumns) {
      _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), sum[i][0]));
      _mm256_storeu_ps(sums + 8, _mm256_add_ps(_mm256_loadu_ps(sums + 8), sum[i][1]));
    }
  }
};

}  // namespace

const MatmulKernel matmul_avx2 = kMatmulKernel<Avx2>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
