// matmul for AMX: tiles of 32 rows x 32 columns, as 2 x 2 of the machine's, whose sums go to memory after each block.
// Of the two factors of a product of tiles one lies row by row, the other in pairs of rows. The gradient, x @ W, takes
// rows of x, and pairs of W's rows; what multiplies with W^T takes W's rows as they lie, and out^T = W x^T.
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")

#include "amx.h"
#include "matmul_avx512_bf16.h"
#include "weight_runs_avx512.h"

namespace qlora::cpu {
namespace {

constexpr std::int64_t kSide = amx::kRows;  // of a tile of sums, and pairs of a row
constexpr std::int64_t kTile = kSide * kSide;

template <typename Isa>
struct AmxTiles : PairsAvx512<Isa> {
  static constexpr std::int64_t kRowBoundary = 2 * kSide, kDepthStep = kSide;
  static constexpr int kTileRows = 2 * kSide, kRowStep = kSide;
  using State = amx::Tiles;
};

struct Amx : AmxTiles<Amx> {
  static constexpr Layout kLayoutOfX = Layout::LanesInLines;
  static constexpr int kPanelsAtOnce = 4;  // a line of W's rows

  // A line of two of W's rows at a time. The 16 weights that a block may have of each are made once, and looked up by
  // codes: of a pair, one is the first row's, one the second's. Rows beyond the depth are zeros.
  static void fill_weight_lines(const Packed4bit& w, std::int64_t J, std::int64_t row, std::int64_t depth,
                                std::int64_t column, std::int64_t width, const Ahead& next, float* panel) {
    constexpr std::int64_t kRowsAhead = 8;
    const __m512 table = _mm512_loadu_ps(codebook(w.quant_type).value);
    const __m512i shifts = shifts_of_codes();
    const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i code = _mm512_set1_epi16(0xf), second_row = _mm512_set1_epi32(0x100000);
    const __mmask64 bytes = ~0ull >> (64 - width / 2);
    const int shift = __builtin_ctzll(static_cast<std::uint64_t>(w.blocksize));
    const std::int64_t steps = steps_of<Amx>(depth);
    for (std::int64_t step = 0; step < steps; ++step, panel += kColumns) {
      next.fetch(step);
      std::int64_t first[2];
      __m512i words[2];
      for (int i = 0; i < 2; ++i) {
        first[i] = (row + smaller(2 * step + i, depth - 1)) * J + column;
        const std::uint8_t* packed = w.packed + first[i] / 2;
        words[i] = _mm512_maskz_loadu_epi8(bytes, packed);
        __builtin_prefetch(packed + kRowsAhead * J / 2);
      }
      // Pairs of words, of 4 codes each, of 16 columns in turn: of a panel the first 16, and the others.
      const __m512i low = _mm512_unpacklo_epi16(words[0], words[1]), high = _mm512_unpackhi_epi16(words[0], words[1]);
      __m512i weights{};
#pragma GCC unroll 4
      for (int q = 0; q < kPanelsAtOnce; ++q) {
        const std::int64_t at = kColumns * q;
        if (at >= width) break;
        if (q == 0 || ((column + at) & (w.blocksize - 1)) == 0) {
          const auto of_block = [&](int i) __attribute__((always_inline)) {
            return table * _mm512_set1_ps(2 * step + i < depth ? block_absmax(w, (first[i] + at) >> shift) : 0.0f);
          };
          weights = (__m512i)_mm512_cvtne2ps_pbh(of_block(1), of_block(0));
        }
        const __m512i pair_of_column = _mm512_add_epi32(quarter, _mm512_set1_epi32(4 * q));
        const auto look_up = [&](__m512i pairs) __attribute__((always_inline)) {
          const __m512i moved = _mm512_srlv_epi16(_mm512_permutexvar_epi32(pair_of_column, pairs), shifts);
          const __m512i codes = _mm512_ternarylogic_epi32(moved, code, second_row, 0xea);  // moved & code | second_row
          return _mm512_permutexvar_epi16(codes, weights);
        };
        _mm512_storeu_si512(panel + at * steps, look_up(low));
        _mm512_storeu_si512(panel + at * steps + kSide, look_up(high));
      }
    }
  }

  // Tiles 0 to 3 are sums, 4 and 5 of x, 6 and 7 of the panel.
  template <int kRows>
  [[gnu::noinline]] static void multiply_tile(const float* x, const float* panel, std::int64_t steps, float* sums) {
    constexpr std::int64_t kStride = kColumns * sizeof(float);
    constexpr bool kBoth = kRows == kTileRows;
    float* const below = sums + kSide * kColumns;
    amx::load<0>(sums, kStride);
    amx::load<1>(sums + kSide, kStride);
    if constexpr (kBoth) {
      amx::load<2>(below, kStride);
      amx::load<3>(below + kSide, kStride);
    }
    const float *x_below = x + kSide * steps, *const end = x_below;
    for (; x < end; x += kTile, x_below += kTile, panel += kSide * kColumns) {
      amx::load<4>(x, amx::kRowBytes);
      amx::load<6>(panel, kStride);
      amx::load<7>(panel + kSide, kStride);
      amx::multiply_add<0, 4, 6>();
      amx::multiply_add<1, 4, 7>();
      if constexpr (kBoth) {
        amx::load<5>(x_below, amx::kRowBytes);
        amx::multiply_add<2, 5, 6>();
        amx::multiply_add<3, 5, 7>();
      }
    }
    amx::store<0>(sums, kStride);
    amx::store<1>(sums + kSide, kStride);
    if constexpr (kBoth) {
      amx::store<2>(below, kStride);
      amx::store<3>(below + kSide, kStride);
    }
  }
};

// The reduction goes in the order of runs of weights, in x and dense factors, too.
struct AmxTransposed : AmxTiles<AmxTransposed> {
  static constexpr std::int64_t kMostBytesOfX = 1 << 19;  // a quarter of the L2 that CPUs with AMX have
  static constexpr Layout kLayoutOfX = Layout::LanesInSteps, kLayoutOfPanel = Layout::LanesInLines;
  static constexpr bool kTransposed = true;
  static_assert(kPerStep * kSide == kWeightRun);

  template <typename T>
  static Vector places(const T* from) {
    const __m512i run = _mm512_castps_si512(PairsAvx512::places(from));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order_of_run(), run));
  }

  // Rows beyond those there are, whose sums nobody reads, are copies of the last.
  static void fill_weight_rows(const Packed4bit& w, std::int64_t K, std::int64_t row, std::int64_t rows, std::int64_t k,
                               std::int64_t depth, float* panel) {
    constexpr int kAtOnce = 4;
    const __m512 table = _mm512_loadu_ps(codebook(w.quant_type).value);
    const __m512i bits = bits_of_run();
    const int shift = __builtin_ctzll(static_cast<std::uint64_t>(w.blocksize));
    for (std::int64_t i = 0; i < kColumns; i += kAtOnce) {
      float* to = panel + i / kSide * kSide * (depth / kPerStep) + i % kSide * kSide;
      std::int64_t first[kAtOnce];
      for (int q = 0; q < kAtOnce; ++q) first[q] = (row + smaller(i + q, rows - 1)) * K + k;
      __m512i weights[kAtOnce] = {};
      for (std::int64_t at = 0; at < depth; at += kWeightRun, to += kTile) {
        const bool begins = at == 0 || ((first[0] + at) & (w.blocksize - 1)) == 0;
#pragma GCC unroll 4
        for (int q = 0; q < kAtOnce; ++q) {
          if (begins) weights[q] = weights_of_block(table, block_absmax(w, (first[q] + at) >> shift));
          _mm512_storeu_si512(to + q * kSide, look_up_run(w.packed + (first[q] + at) / 2, bits, weights[q]));
        }
      }
    }
  }

  // Tiles 0 to 3 are sums, 4 and 5 of the panel, 6 and 7 of x.
  template <int kRows>
  [[gnu::noinline]] static void multiply_tile(const float* x, const float* panel, std::int64_t steps, float* sums) {
    constexpr bool kBoth = kRows == kTileRows;
    amx::load<0>(sums, amx::kRowBytes);
    amx::load<1>(sums + kTile, amx::kRowBytes);
    if constexpr (kBoth) {
      amx::load<2>(sums + 2 * kTile, amx::kRowBytes);
      amx::load<3>(sums + 3 * kTile, amx::kRowBytes);
    }
    const float *x_below = x + kSide * steps, *panel_below = panel + kSide * steps, *const end = x_below;
    for (; x < end; x += kTile, x_below += kTile, panel += kTile, panel_below += kTile) {
      amx::load<4>(panel, amx::kRowBytes);
      amx::load<5>(panel_below, amx::kRowBytes);
      amx::load<6>(x, amx::kRowBytes);
      amx::multiply_add<0, 4, 6>();
      amx::multiply_add<1, 5, 6>();
      if constexpr (kBoth) {
        amx::load<7>(x_below, amx::kRowBytes);
        amx::multiply_add<2, 4, 7>();
        amx::multiply_add<3, 5, 7>();
      }
    }
    amx::store<0>(sums, amx::kRowBytes);
    amx::store<1>(sums + kTile, amx::kRowBytes);
    if constexpr (kBoth) {
      amx::store<2>(sums + 2 * kTile, amx::kRowBytes);
      amx::store<3>(sums + 3 * kTile, amx::kRowBytes);
    }
  }

  // Two tiles of sums, of 16 columns of the panel each, to 16 rows of 32 columns.
  static void transpose_sums(const float* sums, float* to) {
    static_assert(kColumns == 2 * kSide && kLanes == kSide);
    for (std::int64_t column = 0; column < kColumns; column += kSide, sums += kTile) {
      Vector tile[kLanes];
#pragma GCC unroll 16
      for (std::int64_t i = 0; i < kLanes; ++i) tile[i] = load(sums + i * kSide);
      transpose(tile);
#pragma GCC unroll 16
      for (std::int64_t i = 0; i < kLanes; ++i) store(to + i * kColumns + column, tile[i]);
    }
  }
};

// Where a term counts in part only, sums must lie as its mask does.
bool goes_transposed(const Matmul& product) {
  bool any = false, all = true;
  for (int t = 0; t < product.num_terms; ++t) {
    const Term& term = product.terms[t];
    any |= term.kind == Term::Kind::WeightTransposed;
    all &= term.kind != Term::Kind::Weight && term.out_mask == nullptr;
  }
  return any && all;
}

void arrange(const Matmul& product, const MatmulRows& rows, std::int64_t begin, std::int64_t end) {
  (goes_transposed(product) ? arrange_blocks<AmxTransposed> : arrange_blocks<Amx>)(product, rows, begin, end);
}

void multiply(const Matmul& product, const MatmulRows& rows, const Rectangle& rectangle, const MatmulScratch& scratch) {
  (goes_transposed(product) ? multiply_rectangle<AmxTransposed> : multiply_rectangle<Amx>)(product, rows, rectangle,
                                                                                           scratch);
}

}  // namespace

static_assert(fits_the_loops<Amx>() && fits_the_loops<AmxTransposed>());
const MatmulKernel matmul_amx{Amx::kRowBoundary, Amx::kRowStep, Amx::kDepthStep, Amx::kPerStep, arrange, multiply};

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
