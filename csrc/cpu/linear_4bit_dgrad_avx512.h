// linear_4bit_dgrad for few rows, AVX512: 128 columns of W, 64 bytes of a row, at a time. The i-th codes of all dwords
// or words meet the same numbers of grad, and are added up in a register of their own, row of W after row. A file of
// kernels includes this inside its target region.
//
// Isa has
//   kMostAtOnce  rows of grad that meet W as it is decoded once
//   Factors      what the codes of some rows of W are multiplied by: absmax, or that with grad
//   add_rows     a chunk of those rows, times their factors, onto the sums
//   column       of a chunk: what the i-th sum's lane adds up
#include "linear_4bit.h"
#include "linear_4bit_avx512.h"
#include "linear_4bit_dgrad.h"

namespace qlora::cpu {
namespace {

constexpr std::int64_t kChunk = kDgradBoundary;  // columns
constexpr std::int64_t kStrip = 16 * kChunk;     // whose sums lie in the L1
constexpr std::int64_t kRowsAtOnce = 64;         // of W, that are added up before the sums go to memory
constexpr int kSums = 8;                         // of 16 columns, that a chunk has
constexpr std::int64_t kMostBlocks = kStrip / kRun;

// Rows of W and columns of them, of which the first lies at `packed`, and their absmax. `before`: columns of the first
// block that are left out.
struct PartOfW {
  const std::uint8_t* packed;
  std::int64_t stride, rows, columns, before;
  const float* absmax;
  std::int64_t blocks;  // of a row
};

struct ColumnsInRuns {
  static int run_of_lane(int lane) { return lane / 4; }
};

template <int kRows>
using Sums = __m512[kRows][kSums];

template <typename Isa, int kRows>
void finish_chunk(const FewRowsDgrad& p, std::int64_t first, std::int64_t count, const Sums<kRows>& sums) {
  for (int m = 0; m < kRows; ++m) {
    float values[kChunk];
    for (int i = 0; i < kSums; ++i) {
      float lanes[16];
      _mm512_storeu_ps(lanes, sums[m][i]);
      for (int lane = 0; lane < 16; ++lane) values[Isa::column(i, lane)] = lanes[lane];
    }
    const std::int64_t at = m * p.K + first;
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (std::int64_t i = 0; i < count; ++i) {
        const float added = p.addend == nullptr ? 0.0f : p.addend[at + i];
        static_cast<T*>(p.grad_x)[at + i] = round_to<T>(values[i] + added);
      }
    });
  }
}

template <typename Isa, int kRows>
void multiply_columns(const FewRowsDgrad& p, std::int64_t begin, std::int64_t end) {
  const Isa isa(p.w);
  for (std::int64_t first = begin; first < end; first += kStrip) {
    const std::int64_t columns = smaller(end - first, kStrip), before = first % p.w.blocksize;
    const std::int64_t blocks = ceil_div(before + columns, p.w.blocksize);
    Sums<kRows> sums[kStrip / kChunk];
    for (auto& of_chunk : sums) {
      for (auto& of_row : of_chunk) {
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
      }
    }
    for (std::int64_t n = 0; n < p.N; n += kRowsAtOnce) {
      const std::int64_t rows = smaller(p.N - n, kRowsAtOnce);
      float absmax[kRowsAtOnce * kMostBlocks + kAbsmaxBehind];
      decode_absmax_of_rows<SumsAvx512>(p.w, n, rows, p.K, first - before, before + columns, absmax);
      const PartOfW w{p.w.packed + (n * p.K + first) / 2, p.K / 2, rows, columns, before, absmax, blocks};
      const typename Isa::template Factors<kRows> factors(w, p.grad + n, p.N);
      for (std::int64_t k = 0; k < columns; k += kChunk) {
        isa.template add_rows<kRows>(w, k, factors, sums[k / kChunk]);
      }
    }
    for (std::int64_t k = 0; k < columns; k += kChunk) {
      finish_chunk<Isa, kRows>(p, first + k, smaller(columns - k, kChunk), sums[k / kChunk]);
    }
  }
}

template <typename Isa, int kRows = Isa::kMostAtOnce>
void multiply_group(const FewRowsDgrad& p, std::int64_t begin, std::int64_t end) {
  if constexpr (kRows > 1) {
    if (p.M < kRows) return multiply_group<Isa, kRows - 1>(p, begin, end);
  }
  multiply_columns<Isa, kRows>(p, begin, end);
}

template <typename Isa>
void multiply_few_rows_of_grad(const FewRowsDgrad& p, std::int64_t begin, std::int64_t end) {
  each_group(p.M, Isa::kMostAtOnce, [&](std::int64_t m, std::int64_t rows) {
    FewRowsDgrad group = p;
    group.grad = p.grad + m * p.N;
    group.addend = p.addend == nullptr ? nullptr : p.addend + m * p.K;
    group.grad_x = static_cast<char*>(p.grad_x) + m * p.K * itemsize(p.dtype);
    group.M = rows;
    multiply_group<Isa>(group, begin, end);
  });
}

}  // namespace
}  // namespace qlora::cpu
