// The loops of matmul around the kernels of one instruction set. A file of kernels includes this inside its target
// region, so that everything here is compiled for it.
//
// Rows of x are arranged tile by tile, in the type that is multiplied, so that a tile reads one stream. Then, a panel
// of columns of b at a time, or some, b is decoded to it, and multiplied with all rows, tile by tile in registers, onto
// fp32 sums. A weight is decoded once for all rows that are arranged, and never stored beyond the panel.
//
// Isa has
//   kTileRows, kColumns    the most rows of a tile, and its columns, which are a panel's
//   kRowBoundary           where threads' rows may be cut: whole tiles
//   kRowStep, kDepthStep   rows of tiles, and steps of the panel, are multiples of these, zeros behind the last
//   kMostBytesOfX          so much of x stays in the cache; 0 to take one block at a time
//   State                  what a thread holds while it multiplies
//   kLayoutOfX, kLayoutOfPanel  how a tile's rows of x lie, and the panel's columns
//   kTransposed            whether sums are those of out^T, of which `transpose_sums` makes kRowStep rows at a time
//   kChain                 the most additions, steps of the panel, before a tile's sums go to memory
//   kPerStep               elements of the reduction in a row of the panel, and in a place of x: 1, or 2 in bf16
//   kLanes                 places, 32 bits each, of a Vector
//   places                 kLanes * kPerStep elements
//   transpose              kLanes vectors: lane j of vector i goes to lane i of vector j
//   load, store            a Vector of any dtype
//   store_first            its first so many lanes
//   store_panel_rows       dense values, two rows of the panel
//   fill_weight            the panel, from the staged weight W[R, J]: W's rows are the panel's rows
//   fill_weight_transposed the panel, from W[J, R], of which a panel is staged: W's rows are the panel's columns
//   fill_weight_rows       instead of both, where the panel's columns lie apart: from W[J, R] where it lies
//   fill_weight_lines      instead of fill_weight, if kPanelsAtOnce, panels that are filled at a time, is more than 1:
//                          from W[R, J] where it lies; meanwhile it fetches a row a step of what is read later
//   multiply_tile<rows>    so many rows of x @ panel, some steps, onto their sums
#include "matmul_dense.h"

namespace qlora::cpu {
namespace {

// So much of a reduction, whole blocks of it, has sums of its own. (Products of bf16 need none: their factors are
// rounded more.)
template <typename Isa>
constexpr std::int64_t kSegment = Isa::kPerStep == 1 ? 16 * kDepth : INT64_MAX;

// Tiles in vector registers, which a kernel makes of any rows and steps.
struct VectorTiles {
  static constexpr std::int64_t kRowBoundary = 12, kDepthStep = 1, kMostBytesOfX = 0;
  static constexpr int kRowStep = 1, kPanelsAtOnce = 1;
  static constexpr Layout kLayoutOfX = Layout::Steps, kLayoutOfPanel = Layout::Steps;
  static constexpr bool kTransposed = false;
  struct State {};
};

// With those of zeros.
template <typename Isa>
inline std::int64_t rows_of(std::int64_t rows) {
  return ceil_div(rows, Isa::kRowStep) * Isa::kRowStep;
}

// Calls body(term, r, depth, x) for the blocks of each term, as many at a time as `deepest` has, with x where the first
// of them begins.
template <typename Isa, typename Body>
void each_block(const Matmul& product, const MatmulRows& rows, std::int64_t deepest, Body&& body) {
  float* x = rows.x;
  for (int t = 0; t < product.num_terms; ++t) {
    const Term& term = product.terms[t];
    for (std::int64_t r = 0; r < term.R; r += deepest) {
      const std::int64_t depth = smaller(deepest, term.R - r);
      body(term, r, depth, x);
      x += rows_of<Isa>(rows.end - rows.begin) * steps_of<Isa>(depth);
    }
  }
}

template <typename Isa>
void arrange_blocks(const Matmul& product, const MatmulRows& rows, std::int64_t begin, std::int64_t end) {
  each_block<Isa>(product, rows, kDepth, [&](const Term& term, std::int64_t r, std::int64_t depth, float* x) {
    for (std::int64_t row = begin; row < end; row += Isa::kTileRows) {
      const std::int64_t count = smaller(Isa::kTileRows, end - row);
      const Matrix& m = term.x;
      arrange_lines<Isa, Isa::kLayoutOfX>(
          m, {row * m.row_stride + r * m.column_stride, count, m.row_stride, m.column_stride}, 1.0f, depth, count,
          x + (row - rows.begin) * steps_of<Isa>(depth));
    }
  });
}

// The absmax of `count` blocks, from the first-th on, so many apart. Not inlined: among its caller's loops GCC keeps
// addresses on the stack; and of a copy, no value changes with what is stored.
[[gnu::noinline]] inline void copy_absmax(const Packed4bit w, std::int64_t first, std::int64_t stride,
                                          std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = block_absmax(w, first + i * stride);
}

// A part of the weight [*, K] is staged: rows [row, row + rows), columns [column, column + columns). Its absmax, and
// zeros for rows beyond, to the width of whole panels.
inline void stage_absmax(const Packed4bit& w, std::int64_t K, std::int64_t row, std::int64_t rows, std::int64_t column,
                         std::int64_t columns, const MatmulScratch& s) {
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(w.blocksize));
  const std::int64_t end = ceil_div(rows, kMatmulColumnBoundary) * kMatmulColumnBoundary;
  float* to = s.absmax;
  for (std::int64_t at = column; at < column + columns; at += kStep, to += kDepth) {
    if (at > column && at % w.blocksize != 0) {  // the block before goes on: rows are whole blocks
      __builtin_memcpy(to, to - kDepth, static_cast<std::size_t>(end) * sizeof(float));
      continue;
    }
    copy_absmax(w, (row * K + at) >> shift, K >> shift, rows, to);
    for (std::int64_t i = rows; i < end; ++i) to[i] = 0.0f;
  }
}

// For a later stage(), to the L2; nothing of an empty part.
inline void fetch(const Packed4bit& w, std::int64_t K, std::int64_t row, std::int64_t rows, std::int64_t column,
                  std::int64_t columns) {
  if (rows <= 0 || columns <= 0) return;
  const std::int64_t absmax_bytes = w.nested_absmax == nullptr ? sizeof(float) : 1;
  for (std::int64_t i = row; i < row + rows; ++i) {
    const std::int64_t first = i * K + column;
    for (std::int64_t byte = 0; byte < columns / 2; byte += 64) __builtin_prefetch(w.packed + first / 2 + byte, 0, 2);
    __builtin_prefetch(static_cast<const char*>(w.absmax) + first / w.blocksize * absmax_bytes, 0, 2);
  }
}

inline void stage(const Packed4bit& w, std::int64_t K, std::int64_t row, std::int64_t rows, std::int64_t column,
                  std::int64_t columns, const MatmulScratch& s) {
  constexpr std::int64_t kRowsAhead = 8;
  const std::uint8_t* from = w.packed + (row * K + column) / 2;
  for (std::int64_t i = 0; i < rows; ++i, from += K / 2) {
    std::uint8_t* to = s.packed + i * kStagedBytes;
    for (std::int64_t byte = 0; byte < columns / 2; byte += 64) __builtin_prefetch(from + kRowsAhead * K / 2 + byte);
    std::int64_t byte = 0;
    for (; byte + 64 <= columns / 2; byte += 64) __builtin_memcpy(to + byte, from + byte, 64);
    for (; byte < columns / 2; byte += 16) __builtin_memcpy(to + byte, from + byte, 16);
  }
  stage_absmax(w, K, row, rows, column, columns, s);
}

// Rows of a weight that are read later where they lie, `stride` bytes apart: of each the lines of kMaxColumns, to the
// L2. Row by row, beside other work, as a core has few reads in flight.
struct Ahead {
  const std::uint8_t* first;
  std::int64_t stride, rows;

  void fetch(std::int64_t row) const {
    if (row >= rows) return;
    for (std::int64_t byte = 0; byte < kMaxColumns / 2; byte += 64) {
      __builtin_prefetch(first + row * stride + byte, 0, 2);
    }
  }
};

// Of a panel, sums += from, where the mask, if there is one, is true; from may be the sums, which are kept there then,
// and cleared elsewhere.
template <typename Isa>
void add_part(const float* from, const bool* mask, std::int64_t mask_stride, std::int64_t rows, std::int64_t columns,
              float* sums) {
  for (std::int64_t row = 0; row < rows; ++row, from += Isa::kColumns, sums += Isa::kColumns, mask += mask_stride) {
    if (from == sums) {
      for (std::int64_t j = 0; j < columns; ++j) sums[j] = kept(sums[j], mask[j]);
    } else if (mask != nullptr) {
      for (std::int64_t j = 0; j < columns; ++j) sums[j] += kept(from[j], mask[j]);
    } else {
      for (std::int64_t j = 0; j < columns; ++j) sums[j] += from[j];
    }
  }
}

// All rows onto their sums, tile by tile, with smaller ones for the last rows. `steps` are rows of the panel. No chain
// of additions in a register is longer than Isa::kChain.
template <typename Isa, int kRows = Isa::kTileRows>
void multiply_panel(const float* x, std::int64_t rows, const float* panel, std::int64_t steps, float* sums) {
  for (; rows >= kRows; rows -= kRows, x += kRows * steps, sums += kRows * Isa::kColumns) {
    for (std::int64_t step = 0; step < steps; step += Isa::kChain) {
      Isa::template multiply_tile<kRows>(x + step * kRows, panel + step * Isa::kColumns,
                                         smaller(Isa::kChain, steps - step), sums);
    }
  }
  if constexpr (kRows > Isa::kRowStep) {
    if (rows > 0) multiply_panel<Isa, kRows - Isa::kRowStep>(x, rows, panel, steps, sums);
  }
}

// Rows [first, first + rows) of x as arranged, of one block or of several, which have `all_rows` each.
struct RowsOfBlocks {
  const float* x;
  std::int64_t all_rows, first, rows;
};

// Columns [column, column + columns) of the product of some blocks with rows of x, onto their sums.
template <typename Isa>
void multiply_columns(const Matmul& product, const Term& term, std::int64_t begin, std::int64_t depth_of_all,
                      const RowsOfBlocks& x, std::int64_t column, std::int64_t columns, const MatmulScratch& s,
                      float* sums) {
  const std::int64_t end = begin + depth_of_all;
  const bool lines = term.kind == Term::Kind::Weight && Isa::kPanelsAtOnce > 1;
  const std::int64_t at_once = (lines ? Isa::kPanelsAtOnce : 1) * Isa::kColumns;
  if (term.kind == Term::Kind::Weight && !lines) stage(term.w, product.J, begin, depth_of_all, column, columns, s);
  for (std::int64_t j = 0; j < columns; j += at_once) {
    const std::int64_t width = smaller(at_once, columns - j);
    for (std::int64_t r = begin; r < end; r += kDepth) {
      const std::int64_t depth = smaller(kDepth, end - r);
      if (term.kind == Term::Kind::Dense) {
        fill_dense<Isa>(term, r, depth, column + j, width, s.panel);
      } else if constexpr (Isa::kLayoutOfPanel == Layout::LanesInLines) {
        Isa::fill_weight_rows(term.w, term.R, column + j, width, r, depth, s.panel);
      } else if (term.kind == Term::Kind::Weight) {
        if constexpr (Isa::kPanelsAtOnce > 1) {
          // The fills of these columns share the next block's rows.
          const std::int64_t next = end + j;
          const Ahead ahead{term.w.packed + (next * product.J + column) / 2, product.J / 2,
                            smaller(at_once, term.R - next)};
          Isa::fill_weight_lines(term.w, product.J, r, depth, column + j, width, ahead, s.panel);
        } else {
          Isa::fill_weight(term.w.quant_type, s, j, depth);
          fetch(term.w, product.J, r + j, smaller(Isa::kColumns, depth - j), column + columns,
                smaller(kMaxColumns, product.J - column - columns));
        }
      } else {
        // A panel's rows at a time: of so few, copies stay in the L1.
        stage(term.w, term.R, column + j, width, r, depth, s);
        Isa::fill_weight_transposed(term.w.quant_type, s, depth);
        const std::int64_t next = column + j + Isa::kColumns;
        fetch(term.w, term.R, next, smaller(Isa::kColumns, product.J - next), r, depth);
      }
      const std::int64_t steps = steps_of<Isa>(depth);
      const float* const of_block = x.x + x.all_rows * steps_of<Isa>(r - begin) + x.first * steps;
      for (std::int64_t i = 0; i < width; i += Isa::kColumns) {
        multiply_panel<Isa>(of_block, x.rows, s.panel + i * steps, steps, sums + (j + i) * x.rows);
      }
    }
  }
}

// sums + bias, rounded.
template <typename Isa, typename T>
void store_row(const float* sums, const T* bias, std::int64_t columns, T* out) {
  std::int64_t j = 0;
  for (; j + Isa::kLanes <= columns; j += Isa::kLanes) {
    const auto sum = Isa::load(sums + j);
    Isa::store(out + j, bias == nullptr ? sum : sum + Isa::load(bias + j));
  }
  for (; j < columns; ++j) out[j] = round_to<T>(bias == nullptr ? sums[j] : sums[j] + to_float(bias[j]));
}

// A panel's columns meet as many blocks, one after the other, as leave x in the cache, which all panels meet: so much
// the longer are the parts of W's rows that are read in one go.
template <typename Isa>
inline std::int64_t blocks_at_once(std::int64_t rows) {
  const std::int64_t blocks = Isa::kMostBytesOfX / (rows * steps_of<Isa>(kDepth) * 4);
  return blocks > 1 ? blocks : 1;
}

// A rectangle that has room in the scratch.
template <typename Isa>
void multiply_part(const Matmul& product, const MatmulRows& all_rows, const Rectangle& part, const MatmulScratch& s) {
  const std::int64_t rows = part.row_end - part.row_begin, rows_in_tiles = rows_of<Isa>(rows);
  // Sums of a panel lie one after the other, row by row: those of a column begin at
  const auto at = [&](std::int64_t column) { return (column - part.column_begin) * rows_in_tiles; };
  const auto each_panel = [&](auto&& handle) __attribute__((always_inline)) {
    for (std::int64_t column = part.column_begin; column < part.column_end; column += Isa::kColumns) {
      handle(column, smaller(Isa::kColumns, part.column_end - column));
    }
  };
  const std::int64_t panels = ceil_div(part.column_end - part.column_begin, Isa::kColumns);
  const std::int64_t num_sums = panels * Isa::kColumns * rows_in_tiles;
  const auto clear = [&](float* sums) {
    __builtin_memset(sums, 0, static_cast<std::size_t>(num_sums) * sizeof(float));
  };
  clear(s.sums);
  const auto multiply_blocks = [&](const Term& term, std::int64_t r, std::int64_t depth, const float* x) {
    const bool masked = term.out_mask != nullptr;
    // Beside the sums, and added to them at a segment's end: what counts in part only, unless it is the first there,
    // and what would be rounded to the size that long sums have.
    const bool beside = r >= kSegment<Isa> || (masked && &term != product.terms);
    const bool ends = r + depth == term.R || (r + depth) % kSegment<Isa> == 0;
    float* const sums = beside ? s.beside : s.sums;
    if (beside && r % kSegment<Isa> == 0) clear(sums);
    const RowsOfBlocks of_part{x, rows_of<Isa>(all_rows.end - all_rows.begin), part.row_begin - all_rows.begin,
                               rows_in_tiles};
    for (std::int64_t column = part.column_begin; column < part.column_end; column += kMaxColumns) {
      const std::int64_t columns = smaller(kMaxColumns, part.column_end - column);
      multiply_columns<Isa>(product, term, r, depth, of_part, column, columns, s, sums + at(column));
    }
    if (!ends || !(beside || masked)) return;
    each_panel([&](std::int64_t column, std::int64_t columns) {
      const bool* mask = masked ? term.out_mask + part.row_begin * product.J + column : nullptr;
      add_part<Isa>(sums + at(column), mask, masked ? product.J : 0, rows, columns, s.sums + at(column));
    });
  };
  each_block<Isa>(product, all_rows, blocks_at_once<Isa>(rows_in_tiles) * kDepth, multiply_blocks);
  with_type(product.dtype, [&](auto type) {
    using T = decltype(type);
    const T* const bias = static_cast<const T*>(product.bias);
    T* const out = static_cast<T*>(product.out);
    for (std::int64_t row = 0; row < rows; row += Isa::kRowStep) {
      each_panel([&](std::int64_t column, std::int64_t columns) __attribute__((always_inline)) {
        const float* from = s.sums + at(column) + row * Isa::kColumns;
        float in_order[Isa::kTransposed ? Isa::kRowStep * Isa::kColumns : 1];
        if constexpr (Isa::kTransposed) {
          Isa::transpose_sums(from, in_order);
          from = in_order;
        }
        for (std::int64_t i = row; i < smaller(row + Isa::kRowStep, rows); ++i, from += Isa::kColumns) {
          store_row<Isa>(from, bias == nullptr ? nullptr : bias + column, columns,
                         out + (part.row_begin + i) * product.J + column);
        }
      });
    }
  });
}

template <typename Isa>
void multiply_rectangle(const Matmul& product, const MatmulRows& rows, const Rectangle& rectangle,
                        const MatmulScratch& scratch) {
  const auto [row_begin, row_end, column_begin, column_end] = rectangle;
  if (row_begin >= row_end) return;
  [[maybe_unused]] const typename Isa::State state;
  const std::int64_t columns = columns_at_once(rows_of<Isa>(row_end - row_begin));
  for (std::int64_t column = column_begin; column < column_end; column += columns) {
    multiply_part<Isa>(product, rows, {row_begin, row_end, column, smaller(column + columns, column_end)}, scratch);
  }
}

template <typename Isa>
constexpr bool fits_the_loops() {
  // The rows of a part have room in the scratch, as panels; a block of rows that lie apart is one chain, of whole
  // vectors.
  static_assert(kMaxRows % Isa::kRowStep == 0 && Isa::kRowBoundary % Isa::kRowStep == 0);
  constexpr bool kApart = Isa::kLayoutOfX != Layout::Steps;
  static_assert(!kApart || (Isa::kDepthStep == Isa::kLanes && Isa::kRowStep == Isa::kLanes));
  static_assert(!kApart || Isa::kChain * Isa::kPerStep >= kDepth);
  static_assert(kDepth / Isa::kPerStep * Isa::kColumns * Isa::kPanelsAtOnce <= MatmulScratch::kPanelFloats);
  // A fill has a step for each row that it fetches.
  static_assert(Isa::kPanelsAtOnce == 1 || Isa::kPanelsAtOnce * Isa::kColumns <= kDepth / Isa::kPerStep);
  static_assert(Isa::kMostBytesOfX == 0 || Isa::kLayoutOfPanel == Layout::LanesInLines);  // one block can be staged
  return true;
}

template <typename Isa>
  requires(fits_the_loops<Isa>())
constexpr MatmulKernel kMatmulKernel{Isa::kRowBoundary, Isa::kRowStep,       Isa::kDepthStep,
                                     Isa::kPerStep,     arrange_blocks<Isa>, multiply_rectangle<Isa>};

}  // namespace
}  // namespace qlora::cpu
