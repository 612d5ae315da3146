// linear_4bit for few rows of bf16, AMX: 16 rows of W are a tile as they lie in memory, up to 16 rows of x another. A
// run of 32 weights is one row of such a tile. A line of each of the 16 rows is multiplied while the next is decoded.
#include "linear_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")

#include "amx.h"
#include "dynamic_lookup_avx512_vbmi.h"
#include "linear_4bit_tiles_avx512.h"
#include "weight_runs_avx512.h"

namespace qlora::cpu {
namespace {

constexpr std::int64_t kRowsOfX = 16;  // of a tile
constexpr std::int64_t kMostGroups = kMostRowProducts / kRowsOfX;
constexpr std::int64_t kLineWeights = 2 * kLine;
constexpr int kRunsOfLine = kLineWeights / kRun;
static_assert(kMostGroups == 2 && kTileRows == amx::kRows && kRun == kWeightRun && 2 * kRun == amx::kRowBytes);

inline std::int64_t whole_lines(std::int64_t weights) { return ceil_div(weights, kLineWeights) * kLineWeights; }

// Run by run: 16 pairs, of each all rows. Zeros fill up the last line.
void arrange_pairs(const void* x, DType, std::int64_t rows, std::int64_t K, void* arranged) {
  const __m512i order = order_of_run();
  const auto lanes = static_cast<__mmask16>((1u << rows) - 1);
  auto* to = static_cast<float*>(arranged);
  for (std::int64_t k = 0; k < whole_lines(K); k += kRun) {
    __m512 pairs[kRowsOfX];
    for (std::int64_t row = 0; row < kRowsOfX; ++row) {
      if (row >= rows || k >= K) {
        pairs[row] = _mm512_setzero_ps();
        continue;
      }
      const __m512i run = _mm512_loadu_si512(static_cast<const BFloat16*>(x) + row * K + k);
      pairs[row] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, run));
    }
    transpose(pairs);
    for (std::int64_t pair = 0; pair < kRowsOfX; ++pair, to += rows) _mm512_mask_storeu_ps(to, lanes, pairs[pair]);
  }
}

// The rows of x. Tiles 0 and 1 are of W, 2 and 3 of x, the others of sums; where there are two groups, even ones are of
// the first and odd ones of the second.
struct Groups {
  std::int64_t rows[kMostGroups] = {};
  int count = 0;

  explicit Groups(std::int64_t M) {
    each_group(M, kRowsOfX, [&](std::int64_t, std::int64_t of_group) { rows[count++] = of_group; });
  }

  amx::Configuration tiles() const {
    amx::Configuration tiles;
    for (int tile = 2; tile < 8; ++tile) tiles.row_bytes[tile] = static_cast<std::uint16_t>(4 * rows[tile % count]);
    return tiles;
  }
};

// A segment of 16 rows of W, line by line; a line has so many blocks, or is a part of one.
template <int kBlocks>
struct SegmentOfW {
  const std::uint8_t* packed;
  std::int64_t stride, count;
  int shift;
  TileScales scales;
  alignas(64) std::uint8_t end[kTileRows][kLine];  // the last line of each row, if it is not whole

  SegmentOfW(const Packed4bit& w, std::int64_t row, std::int64_t K, std::int64_t k)
      : packed(w.packed + (row * K + k) / 2),
        stride(K / 2),
        count(smaller(K - k, kMaxSegment)),
        shift(__builtin_ctzll(static_cast<std::uint64_t>(w.blocksize))) {
    scales.decode(w, row, K, k, count);
    const std::int64_t rest = count % kLineWeights;
    if (rest == 0) return;
    for (int i = 0; i < kTileRows; ++i) {
      _mm512_store_si512(end[i], load_bytes(packed + (count - rest) / 2 + i * stride, rest / 2));
    }
    // Rows are whole blocks, and so these are shorter than a line.
    for (std::int64_t block = count >> shift; block < kBlocks * lines(); ++block) {
      _mm512_store_ps(scales.value[block], _mm512_setzero_ps());
    }
  }

  std::int64_t lines() const { return ceil_div(count, kLineWeights); }

  TileOfW line(std::int64_t i) const {
    const std::uint8_t *at = packed + kLine * i, *next = at + kTileRows * stride;
    if ((i + 1) * kLineWeights > count) return {end[0], sizeof end[0], next, stride};
    return {at, stride, next, stride};
  }

  using Scales = const float (*)[kTileRows];  // of a block each

  Scales scales_of(std::int64_t line) const {
    return scales.value + (kBlocks == 1 ? line * kLineWeights >> shift : kBlocks * line);
  }
};

struct alignas(64) WeightTiles {
  std::uint8_t run[kRunsOfLine][amx::kTileBytes];

  // weights_of(block, row): the 16 weights, twice, that a block of the line may have. The next tile's line is fetched.
  template <int kBlocks, typename WeightsOf>
  [[gnu::always_inline]] void decode(const TileOfW& w, WeightsOf&& weights_of) {
    constexpr int kRuns = kRunsOfLine / kBlocks;  // of each
    const __m512i bits = bits_of_run();
    const std::uint8_t *packed = w.packed, *next = w.next;
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row, packed += w.stride, next += w.next_stride) {
      __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        const __m512i weights = weights_of(block, row);
#pragma GCC unroll 4
        for (int i = kRuns * block; i < kRuns * (block + 1); ++i) {
          _mm512_store_si512(run[i] + amx::kRowBytes * row, look_up_run(packed + kRun / 2 * i, bits, weights));
        }
      }
    }
  }
};

// Two rows of x and more: weights are rounded as dequantize_4bit's, and sums stay in their tiles: 4 and 5, and 6 and 7
// of every other run, so that additions need not wait for one another.
template <int kGroups, int kBlocks>
struct SeveralRows {
  static constexpr int kBlocksOfLine = kBlocks;
  const Groups& groups;
  const __m512 table;

  SeveralRows(QuantType quant_type, const Groups& groups)
      : groups(groups), table(_mm512_loadu_ps(codebook(quant_type).value)) {}

  void clear() {
    amx::clear<4>(), amx::clear<5>();
    amx::clear<6>(), amx::clear<7>();
  }

  void decode(const SegmentOfW<kBlocks>& w, std::int64_t line, WeightTiles& tiles) const {
    const auto* scales = w.scales_of(line);
    tiles.decode<kBlocks>(w.line(line), [&](int block, int row) __attribute__((always_inline)) {
      return weights_of_block(table, scales[block][row]);
    });
  }

  template <int kRunOfLine>
  [[gnu::always_inline]] void multiply_run(const WeightTiles& w, const char* const (&x)[kMostGroups]) const {
    constexpr int kW = kRunOfLine % 2, kX = kGroups == 2 ? 2 : 2 + kW;
    amx::load<kW>(w.run[kRunOfLine], amx::kRowBytes);
    amx::load<kX>(x[0] + amx::kRowBytes * kRunOfLine * groups.rows[0], 4 * groups.rows[0]);
    amx::multiply_add<4 + 2 * kW, kW, kX>();
    if constexpr (kGroups == 2) {
      amx::load<3>(x[1] + amx::kRowBytes * kRunOfLine * groups.rows[1], 4 * groups.rows[1]);
      amx::multiply_add<5 + 2 * kW, kW, 3>();
    }
  }

  [[gnu::noinline]] void multiply(const SegmentOfW<kBlocks>& w, const FewRows& p, std::int64_t k) {
    const std::int64_t lines = w.lines(), second = groups.rows[0] * whole_lines(p.K);
    const char* x = static_cast<const char*>(p.x);
    const char* of_groups[] = {x + 2 * groups.rows[0] * k, x + 2 * (second + groups.rows[1] * k)};
    WeightTiles tiles[2];
    decode(w, 0, tiles[0]);
    for (std::int64_t line = 0; line < lines; ++line) {
      multiply_run<0>(tiles[line % 2], of_groups);
      multiply_run<1>(tiles[line % 2], of_groups);
      multiply_run<2>(tiles[line % 2], of_groups);
      multiply_run<3>(tiles[line % 2], of_groups);
      for (int g = 0; g < kGroups; ++g) of_groups[g] += amx::kRowBytes * kRunsOfLine * groups.rows[g];
      if (line + 1 < lines) decode(w, line + 1, tiles[(line + 1) % 2]);
    }
  }

  // Both tiles of a group's sums, [rows of W][rows of x], added up.
  template <int kGroup>
  void store_group(const FewRows& p, const TileOfY& y, std::int64_t first) const {
    alignas(64) float even[kTileRows][kRowsOfX] = {}, odd[kTileRows][kRowsOfX] = {};
    amx::store<4 + kGroup>(even, sizeof *even);
    amx::store<6 + kGroup>(odd, sizeof *odd);
    __m512 sums[kTileRows];
    for (int row = 0; row < kTileRows; ++row) sums[row] = _mm512_load_ps(even[row]) + _mm512_load_ps(odd[row]);
    transpose(sums);
    for (std::int64_t m = 0; m < groups.rows[kGroup]; ++m) y.store(p, first + m, sums[m]);
  }

  void store(const FewRows& p, const TileOfY& y) const {
    store_group<0>(p, y, 0);
    if constexpr (kGroups == 2) store_group<1>(p, y, groups.rows[0]);
  }
};

// One row of x: codes are multiplied, and the 16 sums of a block, a column of a tile, are scaled by absmax, which is
// less work than to scale the weights (with 16 rows it would be more). Each of a line's blocks has a tile of its own, 4
// to 7, which is stored when the next line comes, and added one line later still: nothing waits for it.
template <int kBlocks>
struct OneRow {
  static constexpr int kBlocksOfLine = kBlocks;
  struct alignas(64) Sums {
    float block[kBlocks][kTileRows];
  };
  __m512i codes;
  __m512 total;

  OneRow(QuantType quant_type, const Groups&) : codes(codes_in_bf16(quant_type)) {}

  void clear() { total = _mm512_setzero_ps(); }

  void decode(const SegmentOfW<kBlocks>& w, std::int64_t line, WeightTiles& tiles) const {
    tiles.decode<kBlocks>(w.line(line), [&](int, int) __attribute__((always_inline)) { return codes; });
  }

  template <int kBlock>
  static void take_sums(Sums& sums) {
    amx::store<4 + kBlock>(sums.block[kBlock], sizeof(float));
    amx::clear<4 + kBlock>();
  }

  template <int kRunOfLine>
  [[gnu::always_inline]] static void multiply_run(const WeightTiles& w, const char* x, Sums& before) {
    constexpr int kRuns = kRunsOfLine / kBlocks, kBlock = kRunOfLine / kRuns, kW = kRunOfLine % 2;
    if constexpr (kRunOfLine % kRuns == 0) take_sums<kBlock>(before);
    amx::load<kW>(w.run[kRunOfLine], amx::kRowBytes);
    amx::load<2 + kW>(x + amx::kRowBytes * kRunOfLine, sizeof(float));
    amx::multiply_add<4 + kBlock, kW, 2 + kW>();
  }

  void add(const Sums& sums, typename SegmentOfW<kBlocks>::Scales scales) {
    for (int block = 0; block < kBlocks; ++block) {
      total = _mm512_fmadd_ps(_mm512_load_ps(sums.block[block]), _mm512_load_ps(scales[block]), total);
    }
  }

  [[gnu::noinline]] void multiply(const SegmentOfW<kBlocks>& w, const FewRows& p, std::int64_t k) {
    const std::int64_t lines = w.lines();
    const char* x = static_cast<const char*>(p.x) + 2 * k;
    WeightTiles tiles[2];
    Sums sums[3];  // of this line and the two before it
    decode(w, 0, tiles[0]);
    for (std::int64_t line = 0; line < lines; ++line, x += amx::kRowBytes * kRunsOfLine) {
      Sums& before = sums[(line + 2) % 3];
      multiply_run<0>(tiles[line % 2], x, before);
      multiply_run<1>(tiles[line % 2], x, before);
      multiply_run<2>(tiles[line % 2], x, before);
      multiply_run<3>(tiles[line % 2], x, before);
      if (line + 1 < lines) decode(w, line + 1, tiles[(line + 1) % 2]);
      if (line > 1) add(sums[(line + 1) % 3], w.scales_of(line - 2));
    }
    if (lines > 1) add(sums[(lines + 1) % 3], w.scales_of(lines - 2));
    Sums& last = sums[(lines + 2) % 3];
    take_sums<0>(last);
    if constexpr (kBlocks > 1) take_sums<1>(last);
    if constexpr (kBlocks > 2) take_sums<2>(last), take_sums<3>(last);
    add(last, w.scales_of(lines - 1));
  }

  void store(const FewRows& p, const TileOfY& y) const { y.store(p, 0, total); }
};

template <typename Kernel>
void multiply_with(const FewRows& p, const Groups& groups, std::int64_t begin, std::int64_t end) {
  Kernel kernel(p.w.quant_type, groups);
  const amx::Tiles tiles(groups.tiles());
  for (std::int64_t row = begin; row < end; row += kTileRows) {
    const TileOfY y(p, row, end);
    kernel.clear();
    for (std::int64_t k = 0; k < p.K; k += kMaxSegment) {
      kernel.multiply(SegmentOfW<Kernel::kBlocksOfLine>(p.w, y.first, p.K, k), p, k);
    }
    kernel.store(p, y);
  }
}

template <int kBlocks>
void multiply_blocks(const FewRows& p, std::int64_t begin, std::int64_t end) {
  const Groups groups(p.M);
  if (p.M == 1) return multiply_with<OneRow<kBlocks>>(p, groups, begin, end);
  if (groups.count == 1) return multiply_with<SeveralRows<1, kBlocks>>(p, groups, begin, end);
  multiply_with<SeveralRows<2, kBlocks>>(p, groups, begin, end);
}

void multiply(const FewRows& p, std::int64_t begin, std::int64_t end) {
  if (p.w.blocksize == kRun) return multiply_blocks<4>(p, begin, end);
  if (p.w.blocksize == 2 * kRun) return multiply_blocks<2>(p, begin, end);
  multiply_blocks<1>(p, begin, end);
}

constexpr FewRowsKernel kAmx{kLineWeights, sizeof(BFloat16), kRowsOfX, arrange_pairs, multiply};

}  // namespace

const FewRowsKernel& few_rows_amx(std::int64_t M, std::int64_t N) {
  return N >= kTileRows ? kAmx : few_rows_avx512_bf16(M, N);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
