// linear_4bit for few rows of bf16, AMX: 16 rows of W are a tile as they lie in memory, up to 16 rows of x another. A
// run of 32 weights is one row of such a tile.
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
static_assert(kMostGroups == 2 && kTileRows == amx::kRows && kRun == kWeightRun && 2 * kRun == amx::kRowBytes);

// Run by run: 16 pairs, of each all rows.
void arrange_pairs(const void* x, DType, std::int64_t rows, std::int64_t K, void* arranged) {
  const __m512i order = order_of_run();
  const auto lanes = static_cast<__mmask16>((1u << rows) - 1);
  auto* to = static_cast<float*>(arranged);
  for (std::int64_t k = 0; k < K; k += kRun) {
    __m512 pairs[kRowsOfX];
    for (std::int64_t row = 0; row < kRowsOfX; ++row) {
      if (row >= rows) {
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

// The rows of x. Tiles 0 and 1 are of W; 2 and 3 of x, a group of rows each; 4 and 5 their sums, and 6 and 7 of every
// other run, so that additions need not wait for one another.
struct Groups {
  std::int64_t rows[kMostGroups] = {};
  int count = 0;

  explicit Groups(std::int64_t M) {
    each_group(M, kRowsOfX, [&](std::int64_t, std::int64_t of_group) { rows[count++] = of_group; });
  }

  amx::Configuration tiles() const {
    amx::Configuration tiles;
    for (int i = 0; i < count; ++i) {
      for (int tile = 2 + i; tile < 8; tile += 2) tiles.row_bytes[tile] = static_cast<std::uint16_t>(4 * rows[i]);
    }
    return tiles;
  }
};

// The weights of 16 rows, of one run or two.
struct WeightTiles {
  alignas(64) std::uint8_t run[2][amx::kTileBytes];

  // With absmax of the rows, of the first run and of the second, if there is one.
  void decode(__m512 table, const std::uint8_t* packed, std::int64_t stride, const float* first, const float* second) {
    const __m512i shifts = shifts_of_run();
#pragma GCC unroll 4
    for (int row = 0; row < kTileRows; ++row, packed += stride) {
      __m512i weights = weights_of_block(table, first[row]);
      _mm512_store_si512(run[0] + amx::kRowBytes * row, look_up_run(packed, shifts, weights));
      if (second == nullptr) continue;
      if (second != first) weights = weights_of_block(table, second[row]);
      _mm512_store_si512(run[1] + amx::kRowBytes * row, look_up_run(packed + kRun / 2, shifts, weights));
    }
  }
};

// Onto the sums: `count` weights of each of W's rows times the same part of each group of x.
template <int kGroups>
[[gnu::noinline]] void multiply_part(__m512 table, const TileOfW& w, std::int64_t count, std::int64_t blocksize,
                                     const float (*scales)[kTileRows], const Groups& groups,
                                     const char* const (&x)[kMostGroups]) {
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(blocksize));
  const char *first = x[0], *second = x[1];
  const std::int64_t first_row = 4 * groups.rows[0], second_row = 4 * groups.rows[1];
  WeightTiles weights;
  for (std::int64_t at = 0; at < count; at += 2 * kRun) {
    const bool both = at + kRun < count;
    // Half of the next tile's rows in turn, as a line has two blocks.
    for (std::int64_t row = at / kTileBlock % 2 * (kTileRows / 2), i = 0; i < kTileRows / 2; ++i, ++row) {
      __builtin_prefetch(w.next + at / 2 + row * w.next_stride, 0, 2);
    }
    weights.decode(table, w.packed + at / 2, w.stride, scales[at >> shift],
                   both ? scales[(at + kRun) >> shift] : nullptr);
    amx::load<0>(weights.run[0], amx::kRowBytes);
    amx::load<2>(first, first_row);
    amx::multiply_add<4, 0, 2>();
    if constexpr (kGroups == 2) {
      amx::load<3>(second, second_row);
      amx::multiply_add<5, 0, 3>();
    }
    if (!both) break;
    amx::load<1>(weights.run[1], amx::kRowBytes);
    amx::load<2>(first + 16 * first_row, first_row);
    amx::multiply_add<6, 1, 2>();
    if constexpr (kGroups == 2) {
      amx::load<3>(second + 16 * second_row, second_row);
      amx::multiply_add<7, 1, 3>();
    }
    first += 32 * first_row, second += 32 * second_row;
  }
}

// Both tiles of sums, [rows of W][rows of x], added up, and as [rows of x][rows of W].
template <int kEven, int kOdd>
void take_sums(__m512 (&sums)[kRowsOfX]) {
  alignas(64) float even[kTileRows][kRowsOfX] = {}, odd[kTileRows][kRowsOfX] = {};
  amx::store<kEven>(even, sizeof *even);
  amx::store<kOdd>(odd, sizeof *odd);
  for (int row = 0; row < kTileRows; ++row) sums[row] = _mm512_load_ps(even[row]) + _mm512_load_ps(odd[row]);
  transpose(sums);
}

template <int kGroups>
void multiply_groups(const FewRows& p, const Groups& groups, std::int64_t begin, std::int64_t end) {
  const __m512 table = _mm512_loadu_ps(codebook(p.w.quant_type).value);
  const auto* x = static_cast<const char*>(p.x);
  const amx::Tiles tiles(groups.tiles());
  for (std::int64_t row = begin; row < end; row += kTileRows) {
    const TileOfY y(p, row, end);
    amx::clear<4>();
    amx::clear<6>();
    if constexpr (kGroups == 2) {
      amx::clear<5>();
      amx::clear<7>();
    }
    for (std::int64_t k = 0; k < p.K; k += kMaxSegment) {
      const std::int64_t count = smaller(p.K - k, kMaxSegment);
      TileScales scales;
      scales.decode(p.w, y.first, p.K, k, count);
      const std::uint8_t* packed = p.w.packed + (y.first * p.K + k) / 2;
      each_part_of_tile(packed, p.K / 2, count, kMaxSegment, [&](const TileOfW& w, std::int64_t at, std::int64_t part) {
        const char* const of_groups[] = {x + 2 * groups.rows[0] * (k + at),
                                         x + 2 * (groups.rows[0] * p.K + groups.rows[1] * (k + at))};
        multiply_part<kGroups>(table, w, part, p.w.blocksize, scales.value + at / p.w.blocksize, groups, of_groups);
      });
    }
    __m512 sums[kRowsOfX];
    take_sums<4, 6>(sums);
    for (std::int64_t m = 0; m < groups.rows[0]; ++m) y.store(p, m, sums[m]);
    if constexpr (kGroups == 2) {
      take_sums<5, 7>(sums);
      for (std::int64_t m = 0; m < groups.rows[1]; ++m) y.store(p, groups.rows[0] + m, sums[m]);
    }
  }
}

void multiply(const FewRows& p, std::int64_t begin, std::int64_t end) {
  const Groups groups(p.M);
  (groups.count == 2 ? multiply_groups<2> : multiply_groups<1>)(p, groups, begin, end);
}

constexpr FewRowsKernel kAmx{kRun, sizeof(BFloat16), kRowsOfX, arrange_pairs, multiply};

}  // namespace

const FewRowsKernel& few_rows_amx(std::int64_t M, std::int64_t N) {
  return M > 1 && N >= kTileRows ? kAmx : few_rows_avx512_bf16(M, N);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
