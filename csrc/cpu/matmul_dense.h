// How matmul takes dense operands: rows of x, and columns of a dense b, as its kernels want them. A file of kernels
// includes this inside its target region; what Isa has, matmul_loops.h tells.
namespace qlora::cpu {
namespace {

// How lines, rows of x or columns of the panel, lie: each step all of them; or kLanes of them, then the next ones, with
// each step all of these; or likewise with kDepthStep steps of each line in turn.
enum class Layout { Steps, LanesInSteps, LanesInLines };

template <typename Isa>
inline std::int64_t steps_of(std::int64_t depth) {
  return ceil_div(depth, Isa::kPerStep * Isa::kDepthStep) * Isa::kDepthStep;
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

// Numbers of a matrix, `stride` apart; of so many lines, `line_stride` apart, the first of which begins at `first`.
struct MatrixLines {
  std::int64_t first, count, line_stride, stride;
};

// `depth` numbers of each of the first Isa::kLanes lines, scaled: step by step, the places of all lines side by side,
// from the place-th of a step on, and zeros up to `to_stride` or Isa::kLanes places. (Or in lines, kDepthStep steps of
// each.)
template <typename Isa, typename T, bool kInLines>
void interleave(const Matrix& m, const MatrixLines& lines, float scale, std::int64_t depth, std::int64_t place,
                std::int64_t to_stride, float* to) {
  constexpr std::int64_t kElements = Isa::kLanes * Isa::kPerStep;
  const bool as_they_lie = lines.stride == 1 && m.mask == nullptr && scale == 1.0f;
  to += place;
  for (std::int64_t at = 0; at < depth; at += kElements) {
    const std::int64_t count = smaller(kElements, depth - at);
    const auto read = [&](std::int64_t line) __attribute__((always_inline)) {
      if (line >= lines.count) return typename Isa::Vector{};
      const std::int64_t first = lines.first + line * lines.line_stride + at * lines.stride;
      if (as_they_lie) {
        const T* from = static_cast<const T*>(m.values) + first;
        T elements[kElements] = {};
        __builtin_memcpy(elements, from, static_cast<std::size_t>(count) * sizeof(T));
        return Isa::places(elements);
      }
      float values[kElements] = {};
      copy_values<T>(m, first, lines.stride, scale, count, values);
      return Isa::places(values);
    };
    typename Isa::Vector places[Isa::kLanes];
    if (as_they_lie && count == kElements && lines.count >= Isa::kLanes) {
      const T* from = static_cast<const T*>(m.values) + lines.first + at;
#pragma GCC unroll 16
      for (std::int64_t line = 0; line < Isa::kLanes; ++line)
        places[line] = Isa::places(from + line * lines.line_stride);
    } else {
      for (std::int64_t line = 0; line < Isa::kLanes; ++line) places[line] = read(line);
    }
    if constexpr (!kInLines) Isa::transpose(places);
    const std::int64_t steps = steps_of<Isa>(count);
    std::int64_t left = steps_of<Isa>(depth - at) * to_stride - place;  // places to the end
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

// Likewise of `width` lines, zeros for those that are not there.
template <typename Isa, Layout kLayout>
void arrange_lines(const Matrix& m, const MatrixLines& lines, float scale, std::int64_t depth, std::int64_t width,
                   float* to) {
  constexpr bool kAllInStep = kLayout == Layout::Steps;
  with_type(m.dtype, [&](auto type) {
    // The last lines first: what they write into the next step, the first overwrite.
    for (std::int64_t i = (width - 1) / Isa::kLanes * Isa::kLanes; i >= 0; i -= Isa::kLanes) {
      const MatrixLines some{lines.first + i * lines.line_stride, lines.count - i, lines.line_stride, lines.stride};
      interleave<Isa, decltype(type), kLayout == Layout::LanesInLines>(m, some, scale, depth, kAllInStep ? i : 0,
                                                                       kAllInStep ? width : Isa::kLanes,
                                                                       kAllInStep ? to : to + i * steps_of<Isa>(depth));
    }
  });
}

// The panel of a dense b, zeros beyond its width and, after the last of an odd number of rows, one of zeros. In the
// order in which b lies in memory: two rows at a time, or each column.
template <typename Isa>
void fill_dense(const Term& term, std::int64_t r, std::int64_t depth, std::int64_t column, std::int64_t width,
                float* panel) {
  const Matrix& b = term.dense;
  const std::int64_t first = r * b.row_stride + column * b.column_stride;
  if constexpr (Isa::kLayoutOfPanel == Layout::Steps) {
    if (b.column_stride == 1) {
      with_type(b.dtype, [&](auto type) {
        using T = decltype(type);
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
      });
      return;
    }
  }
  arrange_lines<Isa, Isa::kLayoutOfPanel>(b, {first, width, b.column_stride, b.row_stride}, term.scale, depth,
                                          Isa::kColumns, panel);
}

}  // namespace
}  // namespace qlora::cpu
