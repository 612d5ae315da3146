// linear_4bit_dgrad for few rows, AVX512: 128 columns of W, 64 bytes of a row, at a time, in fp32. A dword holds 8
// codes; vpermps looks at the lowest 4 bits of each. The i-th codes of 16 dwords meet one number of grad, and are added
// up in one register, row of W after row.
#include "linear_4bit_dgrad.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "linear_4bit.h"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "dynamic_lookup_avx512.h"
#include "linear_4bit_avx512.h"
#include "linear_4bit_dgrad_loops.h"

namespace qlora::cpu {
namespace {

struct DgradAvx512 : SumsAvx512 {
  static constexpr int kMostRows = 4;
  static constexpr std::int64_t kMostSums = 64;
  static constexpr std::int64_t kStrip = 2048;
  static constexpr std::int64_t kChunk = 128;
  static constexpr std::int64_t kRowsOfW = 64;
  static constexpr int kVectors = 8;  // the i-th has the i-th codes of the chunk's dwords
  using Element = float;
  using Chunk = Vector[kVectors];

  __m512 table;
  LanesAvx512<> lanes;

  explicit DgradAvx512(const Packed4bit& w)
      : table(_mm512_loadu_ps(codebook(w.quant_type).value)), lanes(w.blocksize) {}

  static constexpr int column(int i) { return i % 16 * kVectors + (i / 16 ^ 1); }  // the low nibble is the odd element

  void add_rows(const ChunkOfW& w, const float* grad, std::int64_t stride, std::int64_t M, Chunk* sums) const {
    switch (M) {
      case 1:
        return multiply<1>(w, grad, stride, sums);
      case 2:
        return multiply<2>(w, grad, stride, sums);
      case 3:
        return multiply<3>(w, grad, stride, sums);
      default:
        return multiply<kMostRows>(w, grad, stride, sums);
    }
  }

 private:
  template <int kRows>
  [[gnu::noinline]] void multiply(const ChunkOfW& w, const float* grad, std::int64_t stride, Chunk* sums) const {
    const __m512 codebook = table;
    const LanesAvx512<> of_lane = lanes;
    // All sums of 4 rows would fill the registers.
    constexpr int kAtOnce = kRows < kMostRows ? kVectors : kVectors / 2;
    const bool whole = w.count == kChunk;
    const std::uint64_t present = first_bits(w.count / 2);
    for (int first = 0; first < kVectors; first += kAtOnce) {
      __m512 sum[kRows][kAtOnce];
      for (int m = 0; m < kRows; ++m) {
        for (int i = 0; i < kAtOnce; ++i) sum[m][i] = _mm512_setzero_ps();
      }
      const std::uint8_t* packed = w.packed;
      for (std::int64_t row = 0; row < w.rows; ++row, packed += w.stride) {
        if (first == 0) __builtin_prefetch(packed + kRowsOfW * w.stride, 0, 2);
        // By a mask, a line that is not in the L1 takes longer to come.
        const __m512i dwords = whole ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi8(present, packed);
        asm volatile("" ::: "memory");  // else they are loaded for each shift
        const __m512 scale = of_lane.scales(w.absmax + row * w.absmax_stride);
        // Not grad times absmax, which may overflow where their products with the codes do not.
        const __m512 values = kRows == 1 ? codebook * _mm512_set1_ps(grad[row]) : codebook;
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) {
          const __m512i codes = _mm512_srli_epi32(dwords, static_cast<unsigned>(4 * (first + i)));
          const __m512 looked_up = _mm512_permutexvar_ps(codes, values);
          if (kRows == 1) {
            sum[0][i] = _mm512_fmadd_ps(looked_up, scale, sum[0][i]);
            continue;
          }
          const __m512 weights = looked_up * scale;
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) {
            sum[m][i] = _mm512_fmadd_ps(weights, _mm512_set1_ps(grad[m * stride + row]), sum[m][i]);
          }
        }
      }
      for (int m = 0; m < kRows; ++m) {
        for (int i = 0; i < kAtOnce; ++i) sums[m][first + i] += sum[m][i];
      }
    }
  }
};

}  // namespace

void linear_4bit_dgrad_avx512(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  few_rows_dgrad<DgradAvx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
