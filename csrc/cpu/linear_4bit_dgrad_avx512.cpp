// linear_4bit_dgrad for few rows, AVX512: 128 columns of W, 64 bytes of a row, at a time, in fp32. A dword holds 8
// codes; the i-th codes of 16 dwords meet one number of grad, and are added up in one register, row of W after row.
#include "linear_4bit_dgrad.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "dynamic_lookup_avx512.h"
#include "linear_4bit.h"
#include "linear_4bit_avx512.h"

namespace qlora::cpu {
namespace {

constexpr std::int64_t kChunk = kDgradBoundary;  // columns
constexpr std::int64_t kStrip = 16 * kChunk;     // whose sums lie in the L1
constexpr std::int64_t kRowsAtOnce = 64;         // of W, that are added up before the sums go to memory
constexpr int kMostAtOnce = 4;                   // rows of grad
constexpr int kCodes = 8;                        // of a dword

struct RunsOfDwords {
  static int run_of_lane(int lane) { return lane / 4; }
};
using Lanes = LanesAvx512<RunsOfDwords>;

// Of a chunk: the i-th codes of its dwords.
template <int kRows>
using Sums = __m512[kRows][kCodes];

// A chunk of `rows` rows of W, in the first of which it lies at `packed`, times their grad, onto the sums. `count`: its
// columns, if they are not kWhole.
template <int kRows, bool kWhole>
[[gnu::noinline]] void add_rows(__m512 table, const Lanes& lanes, const FewRowsDgrad& p, const std::uint8_t* packed,
                                std::int64_t count, const float* absmax, std::int64_t absmax_stride, const float* grad,
                                std::int64_t rows, Sums<kRows>& sums) {
  // All sums of 4 rows would fill the registers.
  constexpr int kAtOnce = kRows < kMostAtOnce ? kCodes : kCodes / 2;
  const std::int64_t stride = p.K / 2, ahead = kRowsAtOnce * stride;
  for (int first = 0; first < kCodes; first += kAtOnce) {
    __m512 sum[kRows][kAtOnce];
    for (int m = 0; m < kRows; ++m) {
      for (int i = 0; i < kAtOnce; ++i) sum[m][i] = _mm512_setzero_ps();
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::uint8_t* bytes = packed + row * stride;
      if (first == 0) __builtin_prefetch(bytes + ahead, 0, 2);
      const __m512i dwords = kWhole ? _mm512_loadu_si512(bytes) : load_bytes(bytes, count / 2);
      asm volatile("" ::: "memory");  // else they are loaded for each shift
      __m512 scale = kWhole ? lanes.scales(absmax + row * absmax_stride)
                            : lanes.scales(absmax + row * absmax_stride, count / kRun);
      if (kRows == 1) scale *= _mm512_set1_ps(grad[row]);
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
          sum[m][i] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(grad[m * p.N + row]), sum[m][i]);
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
void multiply_rows(const FewRowsDgrad& p, std::int64_t begin, std::int64_t end) {
  const __m512 table = _mm512_loadu_ps(codebook(p.w.quant_type).value);
  const Lanes lanes(p.w.blocksize);
  for (std::int64_t strip = begin; strip < end; strip += kStrip) {
    const std::int64_t width = smaller(end - strip, kStrip);
    const std::int64_t lead = strip % p.w.blocksize;  // of the first block, that lie before
    const std::int64_t blocks = ceil_div(lead + width, p.w.blocksize);
    Sums<kRows> sums[kStrip / kChunk];
    for (auto& of_chunk : sums) {
      for (auto& of_row : of_chunk) {
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
      }
    }
    for (std::int64_t n = 0; n < p.N; n += kRowsAtOnce) {
      const std::int64_t rows = smaller(p.N - n, kRowsAtOnce);
      float absmax[kRowsAtOnce * (kStrip / kRun) + kAbsmaxBehind];
      decode_absmax_of_rows<SumsAvx512>(p.w, n, rows, p.K, strip - lead, lead + width, absmax);
      for (std::int64_t k = 0; k < width; k += kChunk) {
        const std::uint8_t* packed = p.w.packed + (n * p.K + strip + k) / 2;
        const float* scales = absmax + (lead + k) / p.w.blocksize;
        auto& of_chunk = sums[k / kChunk];
        if (width - k >= kChunk) {
          add_rows<kRows, true>(table, lanes, p, packed, kChunk, scales, blocks, p.grad + n, rows, of_chunk);
        } else {
          add_rows<kRows, false>(table, lanes, p, packed, width - k, scales, blocks, p.grad + n, rows, of_chunk);
        }
      }
    }
    for (std::int64_t k = 0; k < width; k += kChunk) {
      finish_chunk<kRows>(p, strip + k, smaller(width - k, kChunk), sums[k / kChunk]);
    }
  }
}

}  // namespace

void linear_4bit_dgrad_avx512(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  static constexpr decltype(&multiply_rows<1>) kKernels[] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                             multiply_rows<4>};
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
