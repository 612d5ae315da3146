// linear_4bit_dgrad for few rows, AVX512, in fp32. A dword holds 8 codes; vpermps looks at the lowest 4 bits of each.
#include "linear_4bit_dgrad.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "dynamic_lookup_avx512.h"
#include "linear_4bit_dgrad_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 {
  static constexpr int kMostAtOnce = 4;

  __m512 table;
  LanesAvx512<ColumnsInRuns> lanes;
  std::int64_t blocksize;

  explicit Avx512(const Packed4bit& w)
      : table(_mm512_loadu_ps(codebook(w.quant_type).value)), lanes(w.blocksize), blocksize(w.blocksize) {}

  static int column(int i, int lane) { return 8 * lane + (i ^ 1); }  // the low nibble is the odd element

  template <int kRows>
  struct Factors {
    const float* grad;
    std::int64_t stride;

    Factors(const PartOfW&, const float* grad_arg, std::int64_t N) : grad(grad_arg), stride(N) {}
  };

  template <int kRows>
  [[gnu::noinline]] void add_rows(const PartOfW& w, std::int64_t k, const Factors<kRows>& factors,
                                  Sums<kRows>& sums) const {
    // All sums of 4 rows would fill the registers.
    constexpr int kAtOnce = kRows < kMostAtOnce ? kSums : kSums / 2;
    const float *absmax = w.absmax + (w.before + k) / blocksize, *grad = factors.grad;
    const std::uint8_t* const packed = w.packed + k / 2;
    const std::int64_t stride = w.stride, rows = w.rows, ahead = kRowsAtOnce * stride, blocks = w.blocks;
    const std::uint64_t present = first_bits((w.columns - k) / 2);
    for (int first = 0; first < kSums; first += kAtOnce) {
      __m512 sum[kRows][kAtOnce];
      for (int m = 0; m < kRows; ++m) {
        for (int i = 0; i < kAtOnce; ++i) sum[m][i] = _mm512_setzero_ps();
      }
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::uint8_t* bytes = packed + row * stride;
        if (first == 0) __builtin_prefetch(bytes + ahead, 0, 2);
        const __m512i dwords = _mm512_maskz_loadu_epi8(present, bytes);
        const __m512 scales = lanes.scales(absmax + row * blocks);
        const __m512 scale = kRows == 1 ? scales * _mm512_set1_ps(grad[row]) : scales;
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) {
          const __m512i codes = _mm512_srli_epi32(dwords, static_cast<unsigned>(4 * (first + i)));
          const __m512 weights = _mm512_permutexvar_ps(codes, table);
          if (kRows == 1) {
            sum[0][i] = _mm512_fmadd_ps(weights, scale, sum[0][i]);
            continue;
          }
          const __m512 scaled = weights * scale;
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) {
            sum[m][i] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(grad[m * factors.stride + row]), sum[m][i]);
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
  multiply_few_rows_of_grad<Avx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
