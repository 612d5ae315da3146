// The loops of matmul around the kernels of one instruction set. A file of kernels includes this inside its target
// region, so that everything here is compiled for it.
//
// Per block of kDepth of the reduction: the rows of x are copied to one place, in the type that is multiplied. Then, a
// panel of columns of b at a time, b is decoded to the panel, which stays in L1, and multiplied with all rows, tile by
// tile in registers, onto fp32 sums. A weight is decoded once per kMaxRows rows, and never stored beyond the panel.
//
// Isa has
//   kTileRows, kColumns    the most rows of a tile, and its columns, which are a panel's
//   kChain                 the most additions, steps of the panel, before a tile's sums go to memory
//   kPerStep               elements of the reduction in a row of the panel, and in a place of x: 1, or 2 in bf16
//   copy_row               part of a row of x to its place
//   store_panel_rows       dense values, two rows of the panel
//   fill_weight            the panel, from the staged weight W[R, J]: W's rows are the panel's rows
//   fill_weight_transposed the panel, from W[J, R]: W's rows are the panel's columns
//   multiply_tile<rows>    so many rows of x @ panel, some steps, onto their sums
//   store_row              sums + bias, rounded
namespace qlora::cpu {
namespace {

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// `total` in parts of at most `most` and about the same size.
inline std::int64_t even_part(std::int64_t total, std::int64_t most) {
  const std::int64_t parts = (total + most - 1) / most;
  return (total + parts - 1) / parts;
}

// `count` values of a matrix, `stride` apart from the first-th on, scaled, 0 where they are masked.
template <typename T>
void copy_values(const Matrix& m, std::int64_t first, std::int64_t stride, float scale, std::int64_t count, float* to) {
  const T* from = static_cast<const T*>(m.values) + first;
  if (m.mask == nullptr && stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]) * scale;
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const bool counts = m.mask == nullptr || m.mask[first + i * stride];
    to[i] = counts ? to_float(from[i * stride]) * scale : 0.0f;
  }
}

template <typename Isa>
void copy_rows(const Matrix& x, std::int64_t row, std::int64_t rows, std::int64_t r, std::int64_t depth, float* to) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for (std::int64_t i = 0; i < rows; ++i, to += kXStride) {
      const std::int64_t first = (row + i) * x.row_stride + r * x.column_stride;
      if (x.column_stride == 1 && x.mask == nullptr) {
        constexpr std::int64_t kRowsAhead = 4;  // rows are too short for the hardware to see a stream
        const T* from = static_cast<const T*>(x.values) + first;
        const T* ahead = from + kRowsAhead * x.row_stride;
        for (std::int64_t j = 0; j < depth; j += 64 / sizeof(T)) __builtin_prefetch(ahead + j);
        Isa::copy_row(from, depth, to);
      } else {
        float values[kDepth];
        copy_values<T>(x, first, x.column_stride, 1.0f, depth, values);
        Isa::copy_row(values, depth, to);
      }
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
      float even[Isa::kColumns] = {}, odd[Isa::kColumns] = {};
      for (std::int64_t i = 0; i < depth; i += 2) {
        copy_values<T>(b, first + i * b.row_stride, 1, term.scale, width, even);
        if (i + 1 < depth) {
          copy_values<T>(b, first + (i + 1) * b.row_stride, 1, term.scale, width, odd);
        } else {
          for (float& value : odd) value = 0.0f;
        }
        Isa::store_panel_rows(even, odd, i, panel);
      }
      return;
    }
    const std::int64_t steps = (depth + Isa::kPerStep - 1) / Isa::kPerStep;
    float values[kDepth], places[kDepth];
    for (std::int64_t j = 0; j < Isa::kColumns; ++j) {
      if (j < width) {
        copy_values<T>(b, first + j * b.column_stride, b.row_stride, term.scale, depth, values);
        Isa::copy_row(values, depth, places);
      } else if (j == width) {
        __builtin_memset(places, 0, sizeof places);
      }
      for (std::int64_t step = 0; step < steps; ++step) panel[step * Isa::kColumns + j] = places[step];
    }
  });
}

// Rows [row, row + rows) and columns [column, column + columns) of the weight [*, K], to one place. Up to a panel's
// width of rows more have an absmax of 0.
inline void stage(const Packed4bit& w, std::int64_t K, std::int64_t row, std::int64_t rows, std::int64_t column,
                  std::int64_t columns, const MatmulScratch& s) {
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(w.blocksize));
  const std::int64_t steps = (columns + kStep - 1) / kStep;
  constexpr std::int64_t kRowsAhead = 8;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t first = (row + i) * K + column;
    const std::uint8_t* from = w.packed + first / 2;
    std::uint8_t* to = s.packed + i * kStagedBytes;
    for (std::int64_t byte = 0; byte < columns / 2; byte += 16) __builtin_memcpy(to + byte, from + byte, 16);
    for (std::int64_t byte = 0; byte < columns / 2; byte += 64) __builtin_prefetch(from + kRowsAhead * K / 2 + byte);
    for (std::int64_t step = 0; step < steps;) {
      const std::int64_t block = (first + step * kStep) >> shift;
      const std::int64_t steps_end = smaller(steps, (((block + 1) << shift) - first) / kStep);
      const float absmax = block_absmax(w, block);
      for (; step < steps_end; ++step) s.absmax[step * kDepth + i] = absmax;
    }
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    for (std::int64_t i = rows; i < smaller(rows + kMatmulColumnBorder, kDepth); ++i)
      s.absmax[step * kDepth + i] = 0.0f;
  }
}

inline void add_masked(const float* from, const bool* mask, std::int64_t mask_stride, std::int64_t rows,
                       std::int64_t columns, float* sums) {
  for (std::int64_t row = 0; row < rows; ++row, from += kSumStride, sums += kSumStride, mask += mask_stride) {
    for (std::int64_t j = 0; j < columns; ++j) sums[j] += mask[j] ? from[j] : 0.0f;
  }
}

// All rows onto their sums, tile by tile, with a smaller one for the last rows. `steps` are rows of the panel. No chain
// of additions in a register is longer than Isa::kChain.
template <typename Isa, int kRows = Isa::kTileRows>
void multiply_rows(const float* x, std::int64_t rows, const float* panel, std::int64_t steps, float* sums) {
  for (; rows >= kRows; rows -= kRows, x += kRows * kXStride, sums += kRows * kSumStride) {
    for (std::int64_t step = 0; step < steps; step += Isa::kChain) {
      Isa::template multiply_tile<kRows>(x + step, panel + step * Isa::kColumns, smaller(Isa::kChain, steps - step),
                                         sums);
    }
  }
  if constexpr (kRows > 1) {
    if (rows > 0) multiply_rows<Isa, kRows - 1>(x, rows, panel, steps, sums);
  }
}

// Columns [column, column + columns) of the product of rows that are in s.x, as many as are staged at a time, onto
// their sums.
template <typename Isa>
void multiply_columns(const Matmul& product, const Term& term, std::int64_t r, std::int64_t depth, std::int64_t rows,
                      std::int64_t column, std::int64_t columns, const MatmulScratch& s, float* sums) {
  if (term.kind == Term::Kind::Weight) stage(term.w, product.J, r, depth, column, columns, s);
  if (term.kind == Term::Kind::WeightTransposed) stage(term.w, term.R, column, columns, r, depth, s);
  for (std::int64_t j = 0; j < columns; j += Isa::kColumns) {
    if (term.kind == Term::Kind::Dense) {
      fill_dense<Isa>(term, r, depth, column + j, smaller(Isa::kColumns, columns - j), s.panel);
    } else if (term.kind == Term::Kind::Weight) {
      Isa::fill_weight(codebook(term.w.quant_type).value, s, j, depth);
    } else {
      Isa::fill_weight_transposed(codebook(term.w.quant_type).value, s, j, depth);
    }
    multiply_rows<Isa>(s.x, rows, s.panel, (depth + Isa::kPerStep - 1) / Isa::kPerStep, sums + j);
  }
}

// A part of out that has room in the scratch: its sums lie there in blocks of kMaxColumns columns.
template <typename Isa>
void multiply_part(const Matmul& product, const Rectangle& part, const MatmulScratch& s) {
  const std::int64_t rows = part.row_end - part.row_begin;
  const auto each_block = [&](auto&& handle) {
    std::int64_t at = 0;
    for (std::int64_t column = part.column_begin; column < part.column_end; column += kMaxColumns) {
      handle(column, smaller(kMaxColumns, part.column_end - column), at);
      at += rows * kSumStride;
    }
  };
  const std::int64_t blocks = (part.column_end - part.column_begin + kMaxColumns - 1) / kMaxColumns;
  const auto clear = [&](float* sums) {
    __builtin_memset(sums, 0, static_cast<std::size_t>(blocks * rows * kSumStride) * sizeof(float));
  };
  clear(s.sums);
  for (int t = 0; t < product.num_terms; ++t) {
    const Term& term = product.terms[t];
    float* const sums = term.out_mask == nullptr ? s.sums : s.masked;
    if (term.out_mask != nullptr) clear(sums);
    for (std::int64_t r = 0; r < term.R; r += kDepth) {
      const std::int64_t depth = smaller(kDepth, term.R - r);
      copy_rows<Isa>(term.x, part.row_begin, rows, r, depth, s.x);
      each_block([&](std::int64_t column, std::int64_t columns, std::int64_t at) {
        multiply_columns<Isa>(product, term, r, depth, rows, column, columns, s, sums + at);
      });
    }
    if (term.out_mask != nullptr) {
      each_block([&](std::int64_t column, std::int64_t columns, std::int64_t at) {
        const bool* mask = term.out_mask + part.row_begin * product.J + column;
        add_masked(sums + at, mask, product.J, rows, columns, s.sums + at);
      });
    }
  }
  with_type(product.dtype, [&](auto type) {
    using T = decltype(type);
    each_block([&](std::int64_t column, std::int64_t columns, std::int64_t at) {
      const T* bias = product.bias == nullptr ? nullptr : static_cast<const T*>(product.bias) + column;
      T* out = static_cast<T*>(product.out) + part.row_begin * product.J + column;
      for (std::int64_t row = 0; row < rows; ++row, out += product.J) {
        Isa::store_row(s.sums + at + row * kSumStride, bias, columns, out);
      }
    });
  });
}

template <typename Isa>
void multiply_rectangle(const Matmul& product, const Rectangle& rectangle, const MatmulScratch& scratch) {
  const auto [row_begin, row_end, column_begin, column_end] = rectangle;
  if (row_begin >= row_end || column_begin >= column_end) return;
  const std::int64_t rows = even_part(row_end - row_begin, kMaxRows);
  const std::int64_t columns = kMaxRows / rows * kMaxColumns;  // of fewer rows there is room for more columns
  for (std::int64_t row = row_begin; row < row_end; row += rows) {
    for (std::int64_t column = column_begin; column < column_end; column += columns) {
      multiply_part<Isa>(product, {row, smaller(row + rows, row_end), column, smaller(column + columns, column_end)},
                         scratch);
    }
  }
}

}  // namespace
}  // namespace qlora::cpu
