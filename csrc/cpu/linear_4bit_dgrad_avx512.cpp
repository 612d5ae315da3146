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

namespace qlora::cpu {
namespace {

constexpr std::int64_t kChunk = kDgradBoundary;  // columns
constexpr std::int64_t kStrip = 16 * kChunk;     // whose sums, 8 KB a row of grad, stay in the L1
constexpr std::int64_t kRowsAtOnce = 64;         // of W, that are added up before the sums go to memory
constexpr int kMostAtOnce = 4;                   // rows of grad
constexpr int kCodes = 8;                        // of a dword

// Of a chunk: the i-th codes of its dwords.
template <int kRows>
using Sums = __m512[kRows][kCodes];

// A chunk of some rows of W, of `count` columns that there are, and absmax of its blocks.
struct ChunkOfW {
  const std::uint8_t* packed;
  std::int64_t stride, rows, count;
  const float* absmax;
  std::int64_t absmax_stride;
};

// Times grad[kRows][w.rows], rows N apart, onto the sums.
template <int kRows>
[[gnu::noinline]] void add_rows(__m512 table, const LanesAvx512<>& lanes, const ChunkOfW& w, const float* grad,
                                std::int64_t N, Sums<kRows>& sums) {
  // All sums of 4 rows would fill the registers.
  constexpr int kAtOnce = kRows < kMostAtOnce ? kCodes : kCodes / 2;
  const bool whole = w.count == kChunk;
  const std::uint64_t present = first_bits(w.count / 2);
  for (int first = 0; first < kCodes; first += kAtOnce) {
    __m512 sum[kRows][kAtOnce];
    for (int m = 0; m < kRows; ++m) {
      for (int i = 0; i < kAtOnce; ++i) sum[m][i] = _mm512_setzero_ps();
    }
    const std::uint8_t* packed = w.packed;
    for (std::int64_t row = 0; row < w.rows; ++row, packed += w.stride) {
      if (first == 0) __builtin_prefetch(packed + kRowsAtOnce * w.stride, 0, 2);
      // By a mask, a line that is not in the L1 takes longer to come.
      const __m512i dwords = whole ? _mm512_loadu_si512(packed) : _mm512_maskz_loadu_epi8(present, packed);
      asm volatile("" ::: "memory");  // else they are loaded for each shift
      const __m512 scale = lanes.scales(w.absmax + row * w.absmax_stride);
      // Not grad times absmax, which may overflow where their products with the codes do not.
      const __m512 values = kRows == 1 ? table * _mm512_set1_ps(grad[row]) : table;
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
          sum[m][i] = _mm512_fmadd_ps(weights, _mm512_set1_ps(grad[m * N + row]), sum[m][i]);
        }
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int i = 0; i < kAtOnce; ++i) sums[m][first + i] += sum[m][i];
    }
  }
}

template <int kRows>
void finish_chunk(const FewRowsDgrad& p, std::int64_t column, std::int64_t count, const Sums<kRows>& sums) {
  for (int m = 0; m < kRows; ++m) {
    float by_code[kCodes][16], values[kChunk];
    for (int i = 0; i < kCodes; ++i) _mm512_storeu_ps(by_code[i ^ 1], sums[m][i]);  // the low nibble is the odd element
    for (int i = 0; i < kChunk; ++i) values[i] = by_code[i % kCodes][i / kCodes];
    const std::int64_t at = m * p.K + column;
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (std::int64_t i = 0; i < count; ++i) {
        const float added = p.addend == nullptr ? 0.0f : p.addend[at + i];
        static_cast<T*>(p.grad_x)[at + i] = round_to<T>(values[i] + added);
      }
    });
  }
}

template <int kRows>
void multiply_columns(const FewRowsDgrad& p, std::int64_t begin, std::int64_t end) {
  const __m512 table = _mm512_loadu_ps(codebook(p.w.quant_type).value);
  const LanesAvx512<> lanes(p.w.blocksize);
  for (std::int64_t strip = begin; strip < end; strip += kStrip) {
    const std::int64_t width = smaller(end - strip, kStrip);
    const std::int64_t before = strip % p.w.blocksize;  // columns of the first block that are left out
    const std::int64_t blocks = ceil_div(before + width, p.w.blocksize);
    Sums<kRows> sums[kStrip / kChunk];
    for (auto& of_chunk : sums) {
      for (auto& of_row : of_chunk) {
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
      }
    }
    for (std::int64_t n = 0; n < p.N; n += kRowsAtOnce) {
      const std::int64_t rows = smaller(p.N - n, kRowsAtOnce);
      float absmax[kRowsAtOnce * (kStrip / kRun) + kAbsmaxBehind];
      decode_absmax_of_rows<SumsAvx512>(p.w, n, rows, p.K, strip - before, before + width, absmax);
      for (std::int64_t k = 0; k < width; k += kChunk) {
        const ChunkOfW w{.packed = p.w.packed + (n * p.K + strip + k) / 2,
                         .stride = p.K / 2,
                         .rows = rows,
                         .count = smaller(width - k, kChunk),
                         .absmax = absmax + (before + k) / p.w.blocksize,
                         .absmax_stride = blocks};
        add_rows<kRows>(table, lanes, w, p.grad + n, p.N, sums[k / kChunk]);
      }
    }
    for (std::int64_t k = 0; k < width; k += kChunk) {
      finish_chunk<kRows>(p, strip + k, smaller(width - k, kChunk), sums[k / kChunk]);
    }
  }
}

}  // namespace

void linear_4bit_dgrad_avx512(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  static constexpr decltype(&multiply_columns<1>) kKernels[] = {multiply_columns<1>, multiply_columns<2>,
                                                                multiply_columns<3>, multiply_columns<4>};
  static_assert(sizeof kKernels / sizeof *kKernels == kMostAtOnce);
  each_group(product.M, kMostAtOnce, [&](std::int64_t m, std::int64_t rows) {
    FewRowsDgrad group = product;
    group.grad = product.grad + m * product.N;
    group.addend = product.addend == nullptr ? nullptr : product.addend + m * product.K;
    group.grad_x = static_cast<char*>(product.grad_x) + m * product.K * itemsize(product.dtype);
    group.M = rows;
    kKernels[rows - 1](group, begin, end);
  });
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
