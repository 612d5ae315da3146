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
#include "transpose_bytes.h"

namespace qlora::cpu {
namespace {

struct Avx2 {
  static constexpr std::int64_t kColumns = 16;
  // Rounding errors of longer chains would grow beyond those of torch's kernels.
  static constexpr std::int64_t kChain = 64;
  static constexpr std::int64_t kPerStep = 1;
  static constexpr std::int64_t kLanes = 8;
  using Vector = __m256;
  static constexpr int kTileRows = 6;

  template <typename T>
  static Vector places(const T* from) {
    return load8(from);
  }

  static void transpose(Vector (&x)[kLanes]) { cpu::transpose(x); }

  static void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
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

  // The weights of 16 codes of row r of the panel (low lane) and of row r + 1 (high lane), whose scales are so too.
  static void store_weights(const Planes& planes, __m256i codes, const __m256 (&scale)[4], float* to) {
    __m256 values[4];
    expand(planes, codes, values);
    for (int q = 0; q < 4; ++q) values[q] = _mm256_mul_ps(values[q], scale[q]);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(values[0], values[1], 0x20));
    _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(values[2], values[3], 0x20));
    _mm256_storeu_ps(to + 16, _mm256_permute2f128_ps(values[0], values[1], 0x31));
    _mm256_storeu_ps(to + 24, _mm256_permute2f128_ps(values[2], values[3], 0x31));
  }

  // 16 bytes of 16 of W's rows are transposed, to get 16 columns' bytes side by side.
  static void fill_weight_transposed(const float* values, const MatmulScratch& s, std::int64_t column,
                                     std::int64_t depth) {
    const Planes planes(values);
    const __m128i nibble = _mm_set1_epi8(0xf);
    for (std::int64_t r = 0; r < depth; r += 32) {
      __m256 absmax[4];
      for (int q = 0; q < 4; ++q) {
        const float* from = s.absmax + r / kStep * kDepth + column + 4 * q;
        absmax[q] = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
      }
      __m128i bytes[16];
      transpose_bytes(s.packed + column * kStagedBytes + r / 2, kStagedBytes, bytes);
      for (int i = 0; i < 16; ++i) {
        const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes[i], 4), nibble);
        const __m128i low = _mm_and_si128(bytes[i], nibble);
        store_weights(planes, _mm256_set_m128i(low, high), absmax, s.panel + (r + 2 * i) * kColumns);
      }
    }
  }

  // Two of W's rows at a time, 8 bytes of each; after the last of an odd number comes one of zeros.
  static void fill_weight(const float* values, const MatmulScratch& s, std::int64_t column, std::int64_t depth) {
    const Planes planes(values);
    const __m128i nibble = _mm_set1_epi8(0xf);
    for (std::int64_t r = 0; r < depth; r += 2) {
      const std::uint8_t* first = s.packed + r * kStagedBytes + column / 2;
      const __m128i bytes = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)),
                                               _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first + kStagedBytes)));
      const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
      const __m128i low = _mm_and_si128(bytes, nibble);
      const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
      const float* absmax = s.absmax + column / kStep * kDepth + r;
      const __m256 scale = _mm256_set_m128(_mm_set1_ps(absmax[1]), _mm_set1_ps(absmax[0]));
      store_weights(planes, codes, {scale, scale, scale, scale}, s.panel + r * kColumns);
    }
  }

  // Inlined into the loops over tiles, GCC 12 keeps half of the sums on the stack, at half the speed (so with -fwrapv).
  template <int kRows>
  [[gnu::noinline]] static void multiply_tile(const float* x, const float* panel, std::int64_t steps, float* sums) {
    __m256 sum[kRows][2];
    for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (std::int64_t step = 0; step < steps; ++step, panel += kColumns) {
      const __m256 b0 = _mm256_loadu_ps(panel), b1 = _mm256_loadu_ps(panel + 8);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m256 a = _mm256_broadcast_ss(x + step * kRows + i);
        sum[i][0] = _mm256_fmadd_ps(a, b0, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(a, b1, sum[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i, sums += kSumStride) {
      _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), sum[i][0]));
      _mm256_storeu_ps(sums + 8, _mm256_add_ps(_mm256_loadu_ps(sums + 8), sum[i][1]));
    }
  }

  template <typename T>
  static void store_row(const float* sums, const T* bias, std::int64_t columns, T* out) {
    std::int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      const __m256 sum = _mm256_loadu_ps(sums + j);
      store8(out + j, bias == nullptr ? sum : _mm256_add_ps(sum, load8(bias + j)));
    }
    for (; j < columns; ++j) out[j] = round_to<T>(bias == nullptr ? sums[j] : sums[j] + to_float(bias[j]));
  }
};

}  // namespace

const MatmulKernel matmul_avx2 = kMatmulKernel<Avx2>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
