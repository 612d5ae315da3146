// linear_4bit for three and more rows of x, AVX512: 16 rows of W lie across the lanes and meet one number of x, or one
// pair, at a time. No sum is added up across lanes, and 16 absmax scale 64 weights each at once; for that, W's codes
// and absmax must be transposed, which pays from three rows on. A file of kernels includes this inside its target
// region.
//
// Isa has
//   Element       of x as it is multiplied
//   kFactors      elements of x, and weights, that a lane multiplies in a step
//   kShifts       steps that the 8 codes of a dword take
//   decode        the weights of step i of 16 dwords
//   in_order      16 bytes of x as the steps want them
//   multiply_add  16 rows' weights times the same elements of x, onto their sums
#include "linear_4bit_avx512.h"
#include "row_products.h"

namespace qlora::cpu {
namespace {

constexpr int kTileRows = kFewRowsBoundary;  // of W
constexpr int kTileChains = 2;               // of dependent additions, to keep the units busy
constexpr int kStepsAhead = 2;               // that weights are decoded before they are multiplied
constexpr int kMostInTile = 8;               // rows of x: with two chains each half of the registers
constexpr int kLeastInTile = 3;              // each_group, of more than the most, makes none of fewer than half
constexpr std::int64_t kTileBlock = 64;      // weights of a row that are added up before they are scaled
constexpr std::int64_t kTilePart = 1024;     // that all groups of rows meet, one after the other, in the L1

// Of 4 vectors of which the i-th has 16 bytes of rows i, 4 + i, 8 + i and 12 + i: the j-th dwords of all rows.
inline void transpose_dwords(const __m512i (&rows)[4], __m512i (&columns)[4]) {
  const __m512i low[2] = {_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpacklo_epi32(rows[2], rows[3])};
  const __m512i high[2] = {_mm512_unpackhi_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[2], rows[3])};
  columns[0] = _mm512_unpacklo_epi64(low[0], low[1]);
  columns[1] = _mm512_unpackhi_epi64(low[0], low[1]);
  columns[2] = _mm512_unpacklo_epi64(high[0], high[1]);
  columns[3] = _mm512_unpackhi_epi64(high[0], high[1]);
}

// 16 bytes of each of 16 rows, which become lanes: the j-th dwords of all rows.
inline void load_columns(const void* from, std::int64_t row_bytes, __m512i (&columns)[4]) {
  __m512i rows[4];
  for (int i = 0; i < 4; ++i) {
    const auto load = [&](int row) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + row * row_bytes));
    };
    rows[i] = _mm512_castsi128_si512(load(i));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x00f0, load(4 + i));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x0f00, load(8 + i));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0xf000, load(12 + i));
  }
  transpose_dwords(rows, columns);
}

// Absmax of one block of each of 16 rows after the other, as many blocks as a segment has.
struct TileScales {
  static constexpr std::int64_t kBlocks = kMaxSegment / kRun;
  alignas(64) float value[kBlocks][kTileRows];

  // Of `count` weights of rows of K, from the k-th on: whole blocks.
  void decode(const Packed4bit& w, std::int64_t first_row, std::int64_t K, std::int64_t k, std::int64_t count) {
    const std::int64_t blocks = count / w.blocksize;
    float absmax[kTileRows * kBlocks + kAbsmaxBehind];
    decode_absmax_of_rows<SumsAvx512>(w, first_row, kTileRows, K, k, count, absmax);
    for (std::int64_t i = 0; i < blocks; i += 4) {
      __m512i columns[4];
      load_columns(absmax + i, 4 * blocks, columns);
      for (int j = 0; j < 4 && i + j < blocks; ++j) _mm512_store_si512(value[i + j], columns[j]);
    }
  }
};

// As many of From as make 16 bytes of To.
template <typename To, typename From>
inline __m128i load_as(const From* from) {
  if constexpr (std::is_same_v<To, From>) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  } else {
    static_assert(std::is_same_v<To, float>);
    const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    if constexpr (std::is_same_v<From, Half>) {
      return _mm_castps_si128(_mm_cvtph_ps(words));
    } else {
      return _mm_slli_epi32(_mm_cvtepu16_epi32(words), 16);
    }
  }
}

// x in the order in which multiply_tile meets it, all rows of a dword side by side.
template <typename Isa, typename From>
void arrange_in_dwords(const From* x, std::int64_t rows, std::int64_t K, std::int32_t* to) {
  using To = typename Isa::Element;
  const auto lanes = static_cast<__mmask16>((1u << rows) - 1);
  for (std::int64_t k = 0; k < K; k += 16 / static_cast<std::int64_t>(sizeof(To)), to += 4 * rows) {
    __m512i rows_of_x[4], columns[4];
    for (std::int64_t i = 0; i < 4; ++i) {
      const auto load = [&](std::int64_t row) {
        return row < rows ? Isa::in_order(load_as<To>(x + row * K + k)) : _mm_setzero_si128();
      };
      rows_of_x[i] = _mm512_castsi256_si512(_mm256_set_m128i(load(4 + i), load(i)));
    }
    transpose_dwords(rows_of_x, columns);
    for (int i = 0; i < 4; ++i) _mm512_mask_storeu_ps(to + i * rows, lanes, _mm512_castsi512_ps(columns[i]));
  }
}

// Of the dtypes that come to Isa: its own, and to fp32 all.
template <typename Isa>
void arrange_for_tiles(const void* x, DType dtype, std::int64_t rows, std::int64_t K, void* arranged) {
  with_type(dtype, [&](auto type) {
    if constexpr (sizeof(typename Isa::Element) == 4 || std::is_same_v<decltype(type), typename Isa::Element>) {
      arrange_in_dwords<Isa>(static_cast<const decltype(type)*>(x), rows, K, static_cast<std::int32_t*>(arranged));
    }
  });
}

// kTileRows rows of W, so far from each other, and what is fetched meanwhile: the next tile's, likewise.
struct TileOfW {
  const std::uint8_t* packed;
  std::int64_t stride;
  const std::uint8_t* next;
  std::int64_t next_stride;
};

// Onto the sums of a tile of y, [kRows][kTileRows]: `count` weights of each of W's rows times the same part of x. The
// next run is loaded, and the next steps' weights are decoded, before the products that do not wait for them: they
// would fill the units' queues.
template <typename Isa, int kRows>
[[gnu::noinline]] void multiply_tile(const Isa& isa, const typename Isa::Element* x, const TileOfW& tile,
                                     std::int64_t count, std::int64_t blocksize, const float (*scales)[kTileRows],
                                     float* sums) {
  const TileOfW w = tile;  // in registers: `tile` would be read again after each barrier below
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(blocksize));
  const std::int64_t block = smaller(blocksize, kTileBlock);
  __m512i ahead[4];
  load_columns(w.packed, w.stride, ahead);
  static_assert(Isa::kShifts % kStepsAhead == 0);
  decltype(isa.decode(ahead[0], 0)) decoded[kStepsAhead];
  for (int i = 0; i < kStepsAhead; ++i) decoded[i] = isa.decode(ahead[0], i);
  for (std::int64_t at = 0; at < count; at += block) {
    __m512 products[kRows][kTileChains];
    for (auto& of_row : products) {
      for (auto& product : of_row) product = _mm512_setzero_ps();
    }
    // Half of the next tile's rows in turn, as a line has two blocks. (One that two rows share may be left out.)
    const std::int64_t first = at / kTileBlock % 2 * (kTileRows / 2);
    for (std::int64_t row = first; row < first + kTileRows / 2; ++row) {
      __builtin_prefetch(w.next + at / 2 + row * w.next_stride, 0, 2);
    }
    for (std::int64_t run = at; run < at + block; run += kRun) {
      const __m512i dwords[4] = {ahead[0], ahead[1], ahead[2], ahead[3]};
      load_columns(w.packed + smaller(run + kRun, count - kRun) / 2, w.stride, ahead);  // the last again: unused
#pragma GCC unroll 4
      for (int d = 0; d < 4; ++d) {
        const __m512i then = d < 3 ? dwords[d + 1] : ahead[0];
#pragma GCC unroll 8
        for (int i = 0; i < Isa::kShifts; ++i) {
          const auto weights = decoded[i % kStepsAhead];
          const int next = i + kStepsAhead;
          decoded[i % kStepsAhead] = isa.decode(next < Isa::kShifts ? dwords[d] : then, next % Isa::kShifts);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m, x += Isa::kFactors) {
            __m512& product = products[m][i % kTileChains];
            product = Isa::multiply_add(weights, x, product);
          }
        }
      }
    }
    asm volatile("" ::: "memory");  // the sums stay there: in registers, they would push the products out of them
    static_assert(kTileChains == 2);
    const __m512 scale = _mm512_load_ps(scales[at >> shift]);
    for (int m = 0; m < kRows; ++m) {
      float* sum = sums + m * kTileRows;
      _mm512_store_ps(sum, _mm512_fmadd_ps(products[m][0] + products[m][1], scale, _mm512_load_ps(sum)));
    }
  }
}

// Calls multiply(w, at, part) for all of the `count` weights of the rows, parts of them one after the other, of
// `longest` weights at most. Rows that are a multiple of 4 KB apart lie in the same set of the L1, and each of their
// lines is needed four times: copied first.
template <typename Multiply>
void each_part_of_tile(const std::uint8_t* packed, std::int64_t row_bytes, std::int64_t count, std::int64_t longest,
                       Multiply&& multiply) {
  const std::uint8_t* next = packed + kTileRows * row_bytes;
  if (row_bytes % 4096 != 0) {
    for (std::int64_t at = 0; at < count; at += longest) {
      multiply({packed + at / 2, row_bytes, next + at / 2, row_bytes}, at, smaller(count - at, longest));
    }
    return;
  }
  constexpr std::int64_t kBytes = 256;
  alignas(64) std::uint8_t copy[kTileRows][kBytes + 64];
  for (std::int64_t byte = 0; byte < count / 2; byte += kBytes) {
    for (int row = 0; row < kTileRows; ++row) __builtin_memcpy(copy[row], packed + byte + row * row_bytes, kBytes);
    multiply({copy[0], sizeof copy[0], next + byte, row_bytes}, 2 * byte, 2 * kBytes);
  }
}

template <typename T>
inline void store_lanes(T* to, __m512 x, __mmask16 lanes) {
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, lanes, x);
  } else {
    _mm256_mask_storeu_epi16(to, lanes, round16(x, T{}));
  }
}

// The columns of y that a tile of W makes, from `row` on: of those before `end` that are there. The last tile may
// overlap another.
struct TileOfY {
  std::int64_t first;
  __mmask16 lanes;

  TileOfY(const FewRows& p, std::int64_t row, std::int64_t end)
      : first(row + kTileRows <= p.N ? row : p.N - kTileRows) {
    const std::int64_t behind = first + kTileRows < end ? 0 : first + kTileRows - end;
    lanes = static_cast<__mmask16>(0xffffu >> behind & 0xffffu << (row - first));
  }

  void store(const FewRows& p, std::int64_t m, __m512 sum) const {
    if (p.addend != nullptr) sum += _mm512_maskz_loadu_ps(lanes, p.addend + m * p.addend_stride + first);
    with_type(p.dtype,
              [&](auto type) { store_lanes(static_cast<decltype(type)*>(p.y) + m * p.N + first, sum, lanes); });
  }
};

inline bool pays_in_tiles(std::int64_t M, std::int64_t N) { return M >= kLeastInTile && N >= kTileRows; }

template <typename Isa>
void multiply_in_tiles(const FewRows& p, std::int64_t begin, std::int64_t end) {
  constexpr decltype(&multiply_tile<Isa, kMostInTile>) kKernels[] = {multiply_tile<Isa, 3>, multiply_tile<Isa, 4>,
                                                                     multiply_tile<Isa, 5>, multiply_tile<Isa, 6>,
                                                                     multiply_tile<Isa, 7>, multiply_tile<Isa, 8>};
  static_assert(sizeof kKernels / sizeof *kKernels == kMostInTile - kLeastInTile + 1);
  static_assert(kLeastInTile <= kMostInTile / 2);
  const Isa isa(p.w.quant_type);
  const auto* x = static_cast<const typename Isa::Element*>(p.x);
  const std::int64_t longest = p.M > kMostInTile ? kTilePart : kMaxSegment;
  for (std::int64_t row = begin; row < end; row += kTileRows) {
    const TileOfY y(p, row, end);
    // Of the first segment, onto which those of a later one are added: chains as long as K would be less exact.
    alignas(64) float sums[kMostRowProducts][kTileRows], later[kMostRowProducts][kTileRows];
    for (std::int64_t m = 0; m < p.M; ++m) _mm512_store_ps(sums[m], _mm512_setzero_ps());
    for (std::int64_t k = 0; k < p.K; k += kMaxSegment) {
      auto* const to = k == 0 ? sums : later;
      for (std::int64_t m = 0; m < p.M && k > 0; ++m) _mm512_store_ps(later[m], _mm512_setzero_ps());
      const std::int64_t count = smaller(p.K - k, kMaxSegment);
      TileScales scales;
      scales.decode(p.w, y.first, p.K, k, count);
      const std::uint8_t* packed = p.w.packed + (y.first * p.K + k) / 2;
      each_part_of_tile(packed, p.K / 2, count, longest, [&](const TileOfW& w, std::int64_t at, std::int64_t part) {
        each_group(p.M, kMostInTile, [&](std::int64_t m, std::int64_t rows) {
          kKernels[rows - kLeastInTile](isa, x + m * p.K + (k + at) * rows, w, part, p.w.blocksize,
                                        scales.value + at / p.w.blocksize, to[m]);
        });
      });
      for (std::int64_t m = 0; m < p.M && k > 0; ++m) {
        _mm512_store_ps(sums[m], _mm512_add_ps(_mm512_load_ps(sums[m]), _mm512_load_ps(later[m])));
      }
    }
    for (std::int64_t m = 0; m < p.M; ++m) y.store(p, m, _mm512_load_ps(sums[m]));
  }
}

template <typename Isa>
constexpr FewRowsKernel kInTiles{kRun, sizeof(typename Isa::Element), kMostInTile, arrange_for_tiles<Isa>,
                                 multiply_in_tiles<Isa>};

}  // namespace
}  // namespace qlora::cpu
