// linear_4bit_dgrad for few rows, AVX2 and FMA, in fp32: 64 columns of W, 32 bytes of a row, at a time. Of some rows of
// W they are decoded to the L1, where all rows of grad meet them.
#include "linear_4bit_dgrad.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "linear_4bit.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "linear_4bit_avx2.h"
#include "linear_4bit_dgrad_loops.h"

namespace qlora::cpu {
namespace {

struct DgradAvx2 : AbsmaxInTurn {
  static constexpr int kMostRows = 16;
  static constexpr std::int64_t kMostSums = 256;
  static constexpr std::int64_t kStrip = 1024;
  static constexpr std::int64_t kChunk = 64;
  static constexpr std::int64_t kRowsOfW = 32;
  static constexpr int kVectors = 8;
  using Element = float;
  using Vector = __m256;
  using Chunk = Vector[kVectors];  // sums, or weights of a row

  Planes planes;
  LanesAvx2 lanes;

  explicit DgradAvx2(const Packed4bit& w) : planes(w.quant_type), lanes(w.blocksize) {}

  // First the bytes' high nibbles, then the low ones, each as `expand` leaves them.
  static constexpr int column(int i) { return 2 * (16 * (i / 4 % 2) + 4 * (i / 8 % 4) + i % 4) + i / 32; }

  void add_rows(const ChunkOfW& w, const float* grad, std::int64_t stride, std::int64_t M, Chunk* sums) const {
    Chunk weights[kRowsOfW];
    if (w.count == kChunk) {
      decode<true>(w, weights);
    } else {
      decode<false>(w, weights);
    }
    for (; M >= 2; M -= 2, grad += 2 * stride, sums += 2) multiply<2>(weights, w.rows, grad, stride, sums);
    if (M == 1) multiply<1>(weights, w.rows, grad, stride, sums);
  }

 private:
  template <bool kWhole>
  [[gnu::noinline]] void decode(const ChunkOfW& w, Chunk* weights) const {
    const Planes table = planes;
    const LanesAvx2 of_lane = lanes;
    const __m256i nibble = _mm256_set1_epi8(0xf);
    const std::uint8_t* packed = w.packed;
    const float* absmax = w.absmax;
    for (std::int64_t row = 0; row < w.rows; ++row, packed += w.stride, absmax += w.absmax_stride) {
      __builtin_prefetch(packed + kRowsOfW * w.stride, 0, 2);
      const __m256i bytes = load_bytes<kWhole>(packed);
      const __m256 scale = of_lane.scales(absmax);
      for (int half = 0; half < 2; ++half) {
        __m256 values[4];
        expand(table, _mm256_and_si256(half == 0 ? _mm256_srli_epi16(bytes, 4) : bytes, nibble), values);
        for (int q = 0; q < 4; ++q) weights[row][4 * half + q] = values[q] * scale;
      }
    }
  }

  template <bool kWhole>
  static __m256i load_bytes(const std::uint8_t* packed) {
    if constexpr (kWhole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));  // a run of 32
  }

  // Rows of grad, so far apart, times `rows` weights of each column, onto the sums, 8 of which are in registers: unless
  // all loops are unrolled, GCC 12 copies the arrays in memory, and keeps the sums there.
  template <int kRows>
  [[gnu::noinline]] static void multiply(const Chunk* weights, std::int64_t rows, const float* grad,
                                         std::int64_t stride, Chunk* sums) {
    constexpr int kAtOnce = kVectors / kRows;
    for (int first = 0; first < kVectors; first += kAtOnce) {
      Vector sum[kRows][kAtOnce];
      const auto each = [&](auto&& body) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
          for (int i = 0; i < kAtOnce; ++i) body(m, i);
        }
      };
      each([&](int m, int i) { sum[m][i] = _mm256_setzero_ps(); });  // no chain of additions as long as N
#pragma GCC unroll 2
      for (std::int64_t row = 0; row < rows; ++row) {
        Vector g[kRows];
        for (int m = 0; m < kRows; ++m) g[m] = _mm256_broadcast_ss(grad + m * stride + row);
        each([&](int m, int i) { sum[m][i] = _mm256_fmadd_ps(weights[row][first + i], g[m], sum[m][i]); });
      }
      each([&](int m, int i) { sums[m][first + i] += sum[m][i]; });
    }
  }
};

}  // namespace

void linear_4bit_dgrad_avx2(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  few_rows_dgrad<DgradAvx2>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
