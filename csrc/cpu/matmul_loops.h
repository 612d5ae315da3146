// The loops of matmul around the kernels of one instruction set. A file of kernels includes this inside its target
// region, so that everything here is compiled for it.
//
// Rows of x are arranged tile by tile, in the type that is multiplied, so that a tile reads one stream. Then, a panel
// of columns of b at a time, b is decoded to the panel, and multiplied with all rows, tile by tile in registers, onto
// fp32 sums. A weight is decoded once for all rows that are arranged, and never stored beyond the panel.
//
// Isa has
//   kTileRows, kColumns    the most rows of a tile, and its columns, which are a panel's
//   kRowBoundary           where threads' rows may be cut: whole tiles
//   kRowStep, kDepthStep   rows of tiles, and steps of the panel, are multiples of these, zeros behind the last
//   kMostOfPanel           of so many bytes of x at most a panel of W's rows is multiplied with the whole depth first
//   State                  what a thread holds while it multiplies
//   kRowsApart             whether each row of a tile has kDepthStep steps in turn, or each step all rows
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
//   multiply_tile<rows>    so many rows of x @ panel, some steps, onto their sums
namespace qlora::cpu {
namespace {

// So much of a reduction, whole blocks of it, has sums of its own. (Products of bf16 need none: their factors are
// rounded more.)
template <typename Isa>
constexpr std::int64_t kSegment = Isa::kPerStep == 1 ? 16 * kDepth : INT64_MAX;

// Tiles in vector registers, which a kernel makes of any rows and steps.
struct VectorTiles {
  static constexpr std::int64_t kRowBoundary = 12, kDepthStep = 1, kMostOfPanel = 0;
  static constexpr int kRowStep = 1;
  static constexpr bool kRowsApart = false;
  struct State {};
};

template <typename Isa>
inline std::int64_t steps_of(std::int64_t depth) {
  return ceil_div(depth, Isa::kPerStep * Isa::kDepthStep) * Isa::kDepthStep;
}

// With those of zeros.
template <typename Isa>
inline std::int64_t rows_of(std::int64_t rows) {
  return ceil_div(rows, Isa::kRowStep) * Isa::kRowStep;
}

// Without a branch, for the compiler to vectorize.
inline float kept(float x, bool keep) {
  return __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, x) & (0u - static_cast<std::uint32_t>(keep)));
}

// `count` values of a matrix, `stride` apart from the first-th on, scaled, 0 where they are masked.
template <typename T>
void copy_values(const Matrix& m, std::int64_t first, std::int64_t stride, float scale, std::int64_t count, float* to) {
  const auto copy = [&](std::int64_t step) __attribute__((always_inline)) {
    const T* from = static_cast<const T*>(m.values) + first;
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * step]) * scale;
    if (m.mask == nullptr) return;
    for (std::int64_t i = 0; i < count; ++i) to[i] = kept(to[i], m.mask[first + i * step]);
  };
  stride == 1 ? copy(1) : copy(stride);
}

// Numbers of a matrix, `stride` apart; of so many lines, `line_stride` apart, the first of which begins at `first` and
// is to be the place-th of a step.
struct MatrixLines {
  std::int64_t first, count, line_stride, stride, place;
};

// `depth` numbers of each of the first Isa::kLanes lines, scaled: step by step, the places of all lines side by side,
// and zeros up to `to_stride` or Isa::kLanes places. (Where lines are to lie apart, line by line, kDepthStep steps.)
template <typename Isa, typename T, bool kApart = false>
void interleave(const Matrix& m, const MatrixLines& lines, float scale, std::int64_t depth, std::int64_t to_stride,
                float* to) {
  constexpr std::int64_t kElements = Isa::kLanes * Isa::kPerStep;
  const bool as_they_lie = lines.stride == 1 && m.mask == nullptr && scale == 1.0f;
  to += lines.place;
  for (std::int64_t at = 0; at < depth; at += kElements) {
    const std::int64_t count = smaller(kElements, depth - at);
    const auto read = [&](std::int64_t line) __attribute__((always_inline)) {
      if (line >= lines.count) return typename Isa::Vector{};
      const std::int64_t first = lines.first + line * lines.line_stride + at * lines.stride;
      if (as_they_lie) {
        const T* from = static_cast<const T*>(m.values) + first;
        if (count == kElements) return Isa::places(from);
        T elements[kElements] = {};
        __builtin_memcpy(elements, from, static_cast<std::size_t>(count) * sizeof(T));
        return Isa::places(elements);
      }
      float values[kElements] = {};
      copy_values<T>(m, first, lines.stride, scale, count, values);
      return Isa::places(values);
    };
    typename Isa::Vector places[Isa::kLanes];
#pragma GCC unroll 16
    for (std::int64_t line = 0; line < Isa::kLanes; ++line) places[line] = read(line);
    if constexpr (!kApart) Isa::transpose(places);
    const std::int64_t steps = steps_of<Isa>(count);
    std::int64_t left = steps_of<Isa>(depth - at) * to_stride - lines.place;  // places to the end
#pragma GCC unroll 16
    for (std::int64_t step = 0; step < Isa::kLanes; ++step, to += to_stride, left -= to_stride) {
      if (step >= steps) break;
      // What a whole vector writes beyond the width, the next steps overwrite.
      if (left >= Isa::kLanes) {
        Isa::store(to, places[step]);
      } else {
        Isa::store_first(to, places[step], left);
      }
    }
  }
}

// Rows [row, row + rows) of x, of a tile, from r on.
template <typename Isa>
void arrange_tile(const Matrix& x, std::int64_t row, std::int64_t rows, std::int64_t r, std::int64_t depth, float* to) {
  with_type(x.dtype, [&](auto type) {
    // The last lines first: what they write into the next step, the first overwrite.
    for (std::int64_t i = (rows - 1) / Isa::kLanes * Isa::kLanes; i >= 0; i -= Isa::kLanes) {
      const std::int64_t first = (row + i) * x.row_stride + r * x.column_stride;
      const std::int64_t place = Isa::kRowsApart ? 0 : i, stride = Isa::kRowsApart ? Isa::kLanes : rows;
      interleave<Isa, decltype(type), Isa::kRowsApart>(x, {first, rows - i, x.row_stride, x.column_stride, place}, 1.0f,
                                                       depth, stride, to + (i - place) * steps_of<Isa>(depth));
    }
  });
}

// Calls body(term, r, depth, x) for each block of each term, with x where its rows begin.
template <typename Isa, typename Body>
void each_block(const Matmul& product, const MatmulRows& rows, Body&& body) {
  float* x = rows.x;
  for (int t = 0; t < product.num_terms; ++t) {
    const Term& term = product.terms[t];
    for (std::int64_t r = 0; r < term.R; r += kDepth) {
      const std::int64_t depth = smaller(kDepth, term.R - r);
      body(term, r, depth, x);
      x += rows_of<Isa>(rows.end - rows.begin) * steps_of<Isa>(depth);
    }
  }
}

template <typename Isa>
void arrange_blocks(const Matmul& product, const MatmulRows& rows, std::int64_t begin, std::int64_t end) {
  each_block<Isa>(product, rows, [&](const Term& term, std::int64_t r, std::int64_t depth, float* x) {
    for (std::int64_t row = begin; row < end; row += Isa::kTileRows) {
      arrange_tile<Isa>(term.x, row, smaller(Isa::kTileRows, end - row), r, depth,
                        x + (row - rows.begin) * steps_of<Isa>(depth));
    }
  });
}

// The panel of a dense b, zeros beyond its width and, after the last of an odd number of rows, one of zeros. In the
// order in which b lies in memory: two rows at a time, or each column.
template <typename Isa>
void fill_dense(const Term& term, std::int64_t r, std::int64_t depth, std::int64_t column, std::int64_t width,
                float* panel) {
  const Matrix& b = term.dense;
  with_type(b.dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t first = r * b.row_stride + column * b.column_stride;
    if (b.column_stride == 1) {
      const bool as_they_lie = b.mask == nullptr && term.scale == 1.0f && width == Isa::kColumns;
      float copy[2][Isa::kColumns] = {};
      for (std::int64_t i = 0; i < depth; i += 2) {
        const std::int64_t even = first + i * b.row_stride, odd = even + b.row_stride;
        if (as_they_lie && i + 1 < depth) {
          const T* from = static_cast<const T*>(b.values);
          Isa::store_panel_rows(from + even, from + odd, i, panel);
          continue;
        }
        copy_values<T>(b, even, 1, term.scale, width, copy[0]);
        if (i + 1 < depth) {
          copy_values<T>(b, odd, 1, term.scale, width, copy[1]);
        } else {
          __builtin_memset(copy[1], 0, sizeof copy[1]);
        }
        Isa::store_panel_rows(copy[0], copy[1], i, panel);
      }
      const std::int64_t rows = ceil_div(depth, 2) * 2 / Isa::kPerStep, zeros = steps_of<Isa>(depth) - rows;
      if (zeros > 0) __builtin_memset(panel + rows * Isa::kColumns, 0, zeros * Isa::kColumns * sizeof(float));
      return;
    }
    for (std::int64_t j = 0; j < Isa::kColumns; j += Isa::kLanes) {
      const MatrixLines lines{first + j * b.column_stride, width - j, b.column_stride, b.row_stride, j};
      interleave<Isa, T>(b, lines, term.scale, depth, Isa::kColumns, panel);
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

// sums += from, where the mask, if there is one, is true; from may be the sums, which are kept there then, and cleared
// elsewhere.
inline void add_part(const float* from, const bool* mask, std::int64_t mask_stride, std::int64_t rows,
                     std::int64_t columns, float* sums) {
  for (std::int64_t row = 0; row < rows; ++row, from += kSumStride, sums += kSumStride, mask += mask_stride) {
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
  for (; rows >= kRows; rows -= kRows, x += kRows * steps, sums += kRows * kSumStride) {
    for (std::int64_t step = 0; step < steps; step += Isa::kChain) {
      Isa::template multiply_tile<kRows>(x + step * kRows, panel + step * Isa::kColumns,
                                         smaller(Isa::kChain, steps - step), sums);
    }
  }
  if constexpr (kRows > Isa::kRowStep) {
    if (rows > 0) multiply_panel<Isa, kRows - Isa::kRowStep>(x, rows, panel, steps, sums);
  }
}

// Columns [column, column + columns) of a block's product with rows of x, onto their sums.
template <typename Isa>
void multiply_columns(const Matmul& product, const Term& term, std::int64_t r, std::int64_t depth, const float* x,
                      std::int64_t rows, std::int64_t column, std::int64_t columns, const MatmulScratch& s,
                      float* sums) {
  if (term.kind == Term::Kind::Weight) stage(term.w, product.J, r, depth, column, columns, s);
  for (std::int64_t j = 0; j < columns; j += Isa::kColumns) {
    if (term.kind == Term::Kind::Dense) {
      fill_dense<Isa>(term, r, depth, column + j, smaller(Isa::kColumns, columns - j), s.panel);
    } else if (term.kind == Term::Kind::Weight) {
      Isa::fill_weight(term.w.quant_type, s, j, depth);
      fetch(term.w, product.J, r + j, smaller(Isa::kColumns, depth - j), column + columns,
            smaller(kMaxColumns, product.J - column - columns));
    } else {
      // A panel's rows at a time: of so few, copies stay in the L1.
      stage(term.w, term.R, column + j, smaller(Isa::kColumns, columns - j), r, depth, s);
      Isa::fill_weight_transposed(term.w.quant_type, s, depth);
      const std::int64_t next = column + j + Isa::kColumns;
      fetch(term.w, term.R, next, smaller(Isa::kColumns, product.J - next), r, depth);
    }
    multiply_panel<Isa>(x, rows, s.panel, steps_of<Isa>(depth), sums + j);
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

// A rectangle that has room in the scratch: its sums lie there in blocks of kMaxColumns columns.
template <typename Isa>
void multiply_part(const Matmul& product, const MatmulRows& all_rows, const Rectangle& part, const MatmulScratch& s) {
  const std::int64_t rows = part.row_end - part.row_begin, rows_in_tiles = rows_of<Isa>(rows);
  const auto each_columns = [&](auto&& handle) {
    std::int64_t at = 0;
    for (std::int64_t column = part.column_begin; column < part.column_end; column += kMaxColumns) {
      handle(column, smaller(kMaxColumns, part.column_end - column), at);
      at += rows_in_tiles * kSumStride;
    }
  };
  const std::int64_t blocks = ceil_div(part.column_end - part.column_begin, kMaxColumns);
  const std::int64_t panels = ceil_div(part.column_end - part.column_begin, Isa::kColumns);
  const auto clear = [&](float* sums) {
    const std::int64_t lines = panels == 1 ? rows_in_tiles : 1;  // of one panel only what it has
    const std::int64_t each = panels == 1 ? Isa::kColumns : blocks * rows_in_tiles * kSumStride;
    for (std::int64_t i = 0; i < lines; ++i, sums += kSumStride) {
      __builtin_memset(sums, 0, static_cast<std::size_t>(each) * sizeof(float));
    }
  };
  clear(s.sums);
  each_block<Isa>(product, all_rows, [&](const Term& term, std::int64_t r, std::int64_t depth, const float* x) {
    const bool masked = term.out_mask != nullptr;
    // Beside the sums, and added to them at a segment's end: what counts in part only, unless it is the first there,
    // and what would be rounded to the size that long sums have.
    const bool beside = r >= kSegment<Isa> || (masked && &term != product.terms);
    const bool ends = r + depth == term.R || (r + depth) % kSegment<Isa> == 0;
    float* const sums = beside ? s.beside : s.sums;
    if (beside && r % kSegment<Isa> == 0) clear(sums);
    x += (part.row_begin - all_rows.begin) * steps_of<Isa>(depth);
    each_columns([&](std::int64_t column, std::int64_t columns, std::int64_t at) {
      multiply_columns<Isa>(product, term, r, depth, x, rows_in_tiles, column, columns, s, sums + at);
      if (ends && (beside || masked)) {
        const bool* mask = masked ? term.out_mask + part.row_begin * product.J + column : nullptr;
        add_part(sums + at, mask, masked ? product.J : 0, rows, columns, s.sums + at);
      }
    });
  });
  with_type(product.dtype, [&](auto type) {
    using T = decltype(type);
    each_columns([&](std::int64_t column, std::int64_t columns, std::int64_t at) {
      const T* bias = product.bias == nullptr ? nullptr : static_cast<const T*>(product.bias) + column;
      T* out = static_cast<T*>(product.out) + part.row_begin * product.J + column;
      for (std::int64_t row = 0; row < rows; ++row, out += product.J) {
        store_row<Isa>(s.sums + at + row * kSumStride, bias, columns, out);
      }
    });
  });
}

template <typename Isa>
void multiply_rectangle(const Matmul& product, const MatmulRows& rows, const Rectangle& rectangle,
                        const MatmulScratch& scratch) {
  const auto [row_begin, row_end, column_begin, column_end] = rectangle;
  if (row_begin >= row_end) return;
  [[maybe_unused]] const typename Isa::State state;
  // Of fewer rows there is room for more columns, whose weights lie side by side.
  std::int64_t columns = kMaxRows / rows_of<Isa>(row_end - row_begin) * kMaxColumns;
  for (int t = 0; t < product.num_terms; ++t) {
    const Term& term = product.terms[t];
    const std::int64_t bytes = (row_end - row_begin) * steps_of<Isa>(term.R) * 4;
    // Then a panel's rows of W are read in one go, while x, which each panel meets, stays in the L2.
    if (term.kind == Term::Kind::WeightTransposed && bytes <= Isa::kMostOfPanel) columns = Isa::kColumns;
  }
  for (std::int64_t column = column_begin; column < column_end; column += columns) {
    multiply_part<Isa>(product, rows, {row_begin, row_end, column, smaller(column + columns, column_end)}, scratch);
  }
}

template <typename Isa>
constexpr bool fits_the_loops() {
  // The rows of a part have room in the scratch; a block of rows that lie apart is one chain, of whole vectors.
  static_assert(kMaxRows % Isa::kRowStep == 0 && Isa::kRowBoundary % Isa::kRowStep == 0);
  static_assert(!Isa::kRowsApart || (Isa::kDepthStep == Isa::kLanes && Isa::kRowStep == Isa::kLanes));
  static_assert(!Isa::kRowsApart || Isa::kChain * Isa::kPerStep >= kDepth);
  return true;
}

template <typename Isa>
  requires(fits_the_loops<Isa>())
constexpr MatmulKernel kMatmulKernel{Isa::kRowBoundary, Isa::kRowStep,       Isa::kDepthStep,
                                     Isa::kPerStep,     arrange_blocks<Isa>, multiply_rectangle<Isa>};

}  // namespace
}  // namespace qlora::cpu
