// linear_4bit_dgrad for few rows, AVX512_BF16 and VBMI. Words of two rows of W lie side by side, 4 codes each; vpermw
// looks at the lowest 5 bits of each, so that a dword becomes the pair of a column's codes, which meets a pair of
// grad * absmax.
#include "linear_4bit_dgrad.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")

#include "dynamic_lookup_avx512_vbmi.h"
#include "linear_4bit_dgrad_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 {
  static constexpr int kMostAtOnce = 5;

  __m512i table, block_of_lane;
  std::int64_t blocksize;

  explicit Avx512Bf16(const Packed4bit& w) : blocksize(w.blocksize) {
    std::uint16_t words[2 * kNumCodes];
    for (int i = 0; i < 2 * kNumCodes; ++i) {
      const int code = i % kNumCodes;
      words[i] = round_code<BFloat16>(w.quant_type, code, codebook(w.quant_type).value[code]).bits;
    }
    table = _mm512_loadu_si512(words);
    block_of_lane = LanesAvx512<ColumnsInRuns>(w.blocksize).block;
  }

  // Sums of the lower words of each 16 bytes of a row, then of the upper ones.
  static int column(int i, int lane) { return 32 * (lane / 4) + 16 * (i / 4) + 4 * (lane % 4) + (i % 4 ^ 1); }

  // grad * absmax of two rows of W side by side, by row of grad, two rows of W, block.
  template <int kRows>
  struct Factors {
    std::uint32_t pair[kRows][kRowsAtOnce / 2][kMostBlocks + 8];

    Factors(const PartOfW& w, const float* grad, std::int64_t N) {
      for (int m = 0; m < kRows; ++m) {
        for (std::int64_t row = 0; row < w.rows; row += 2) {
          for (std::int64_t block = 0; block < w.blocks; block += 16) {
            const auto product = [&](std::int64_t n) {
              if (n == w.rows) return _mm512_setzero_si512();  // the last row is its own neighbour
              const __m512 factor = _mm512_set1_ps(grad[m * N + n]) * _mm512_loadu_ps(w.absmax + n * w.blocks + block);
              return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(factor));
            };
            _mm512_storeu_si512(pair[m][row / 2] + block,
                                _mm512_or_si512(product(row), _mm512_slli_epi32(product(row + 1), 16)));
          }
        }
      }
    }
  };

  template <int kRows>
  [[gnu::noinline]] void add_rows(const PartOfW& w, std::int64_t k, const Factors<kRows>& factors,
                                  Sums<kRows>& sums) const {
    // All sums of more than 3 rows would fill the registers.
    constexpr int kAtOnce = kRows <= 3 ? kSums : kSums / 2;
    const std::int64_t block = (w.before + k) / blocksize;
    const std::uint8_t* const packed = w.packed + k / 2;
    const std::int64_t stride = w.stride, rows = w.rows, ahead = kRowsAtOnce * stride;
    const std::uint64_t present = first_bits((w.columns - k) / 2);
    for (int first = 0; first < kSums; first += kAtOnce) {
      __m512 sum[kRows][kAtOnce];
      for (int m = 0; m < kRows; ++m) {
        for (int i = 0; i < kAtOnce; ++i) sum[m][i] = _mm512_setzero_ps();
      }
      for (std::int64_t row = 0; row < rows; row += 2) {
        const std::uint8_t *even = packed + row * stride, *odd = row + 1 < rows ? even + stride : even;
        if (first == 0) {
          __builtin_prefetch(even + ahead, 0, 2);
          __builtin_prefetch(odd + ahead, 0, 2);
        }
        const __m512i a = _mm512_maskz_loadu_epi8(present, even), b = _mm512_maskz_loadu_epi8(present, odd);
        __m512bh factor[kRows];
        for (int m = 0; m < kRows; ++m) {
          const __m256i blocks = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(factors.pair[m][row / 2] + block));
          factor[m] = (__m512bh)_mm512_permutexvar_epi32(block_of_lane, _mm512_castsi256_si512(blocks));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) {
          const __m512i words = (first + i) / 4 == 0 ? _mm512_unpacklo_epi16(a, b) : _mm512_unpackhi_epi16(a, b);
          const auto codes =
              (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, static_cast<unsigned>(4 * (i % 4))), table);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) sum[m][i] = _mm512_dpbf16_ps(sum[m][i], codes, factor[m]);
        }
      }
      for (int m = 0; m < kRows; ++m) {
        for (int i = 0; i < kAtOnce; ++i) sums[m][first + i] += sum[m][i];
      }
    }
  }
};

}  // namespace

void linear_4bit_dgrad_avx512_bf16(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  multiply_few_rows_of_grad<Avx512Bf16>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
