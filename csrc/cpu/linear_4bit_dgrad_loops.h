// The loops of linear_4bit_dgrad for few rows around the kernel of one instruction set. A file of kernels includes this
// inside its target region, after linear_4bit_loops.h.
//
// Isa is made for a weight, and has
//   kMostRows      rows of grad that are multiplied at once
//   kStrip         columns, at most, that meet all of these before the next
//   kMostSums      chunks of their sums that there is room for, on the stack
//   kRowsOfW       rows of W whose products are added up before the sums go to memory
//   kChunk         columns whose weights are decoded at a time
//   Chunk          kVectors vectors of fp32 numbers, one a column
//   column         the one whose number is at place i
//   decode_absmax  as for linear_4bit
//   Element        of grad as it is multiplied
//   add_rows       a chunk of some rows of W times rows of grad, so far apart, onto the sums
namespace qlora::cpu {
namespace {

// A chunk of some rows of W, of `count` columns that there are, and absmax of its blocks.
struct ChunkOfW {
  const std::uint8_t* packed;
  std::int64_t stride, rows, count;
  const float* absmax;
  std::int64_t absmax_stride;
};

template <typename Isa>
struct PlaceOfColumn {
  std::uint8_t place[Isa::kChunk] = {};

  constexpr PlaceOfColumn() {
    for (int i = 0; i < Isa::kChunk; ++i) place[Isa::column(i)] = static_cast<std::uint8_t>(i);
  }
};

template <typename Isa>
void finish_columns(const FewRowsDgrad& p, std::int64_t column, std::int64_t count, const typename Isa::Chunk* sums) {
  static constexpr PlaceOfColumn<Isa> kOrder;
  for (std::int64_t m = 0; m < p.M; ++m) {
    float values[Isa::kChunk];
    __builtin_memcpy(values, sums[m], sizeof values);
    const std::int64_t at = m * p.K + column;
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (std::int64_t i = 0; i < count; ++i) {
        const float added = p.addend == nullptr ? 0.0f : p.addend[at + i];
        static_cast<T*>(p.grad_x)[at + i] = round_to<T>(values[kOrder.place[i]] + added);
      }
    });
  }
}

template <typename Isa>
void multiply_strip(const Isa& isa, const FewRowsDgrad& p, std::int64_t begin, std::int64_t width) {
  const std::int64_t before = begin % p.w.blocksize;  // columns of the first block that are left out
  const std::int64_t blocks = ceil_div(before + width, p.w.blocksize);
  // Sums of the first segment; a later one has its own, which are added at its end. In one chain over a long N, each
  // product would be rounded to the size of the sum so far.
  constexpr std::int64_t kSegment = 32 * Isa::kRowsOfW;
  typename Isa::Chunk sums[Isa::kMostSums], later[Isa::kMostSums];
  const std::int64_t num_sums = ceil_div(width, Isa::kChunk) * p.M;
  const auto each_chunk = [&](typename Isa::Chunk* of_chunk, auto&& body) {
    for (std::int64_t k = 0; k < width; k += Isa::kChunk, of_chunk += p.M) {
      body(k, smaller(width - k, Isa::kChunk), of_chunk);
    }
  };
  __builtin_memset(sums, 0, static_cast<std::size_t>(num_sums) * sizeof *sums);
  for (std::int64_t segment = 0; segment < p.N; segment += kSegment) {
    typename Isa::Chunk* const to = segment == 0 ? sums : later;
    if (to == later) __builtin_memset(later, 0, static_cast<std::size_t>(num_sums) * sizeof *later);
    for (std::int64_t n = segment; n < smaller(segment + kSegment, p.N); n += Isa::kRowsOfW) {
      const std::int64_t rows = smaller(p.N - n, Isa::kRowsOfW);
      float absmax[Isa::kRowsOfW * (Isa::kStrip / kRun) + kAbsmaxBehind];
      decode_absmax_of_rows<Isa>(p.w, n, rows, p.K, begin - before, before + width, absmax);
      each_chunk(to, [&](std::int64_t k, std::int64_t count, typename Isa::Chunk* of_chunk) {
        const ChunkOfW w{.packed = p.w.packed + (n * p.K + begin + k) / 2,
                         .stride = p.K / 2,
                         .rows = rows,
                         .count = count,
                         .absmax = absmax + (before + k) / p.w.blocksize,
                         .absmax_stride = blocks};
        isa.add_rows(w, static_cast<const typename Isa::Element*>(p.grad) + n, p.grad_stride, p.M, of_chunk);
      });
    }
    for (std::int64_t i = 0; i < num_sums && to == later; ++i) {
      for (int v = 0; v < Isa::kVectors; ++v) sums[i][v] += later[i][v];
    }
  }
  each_chunk(sums, [&](std::int64_t k, std::int64_t count, const typename Isa::Chunk* of_chunk) {
    finish_columns<Isa>(p, begin + k, count, of_chunk);
  });
}

template <typename Isa>
void few_rows_dgrad(const FewRowsDgrad& product, std::int64_t begin, std::int64_t end) {
  const Isa isa(product.w);
  each_group(product.M, Isa::kMostRows, [&](std::int64_t m, std::int64_t rows) {
    FewRowsDgrad group = product;
    group.grad = static_cast<const typename Isa::Element*>(product.grad) + m * product.grad_stride;
    group.addend = product.addend == nullptr ? nullptr : product.addend + m * product.K;
    group.grad_x = static_cast<char*>(product.grad_x) + m * product.K * itemsize(product.dtype);
    group.M = rows;
    const std::int64_t width = smaller(Isa::kStrip, Isa::kMostSums / rows * Isa::kChunk);
    for (std::int64_t strip = begin; strip < end; strip += width) {
      multiply_strip(isa, group, strip, smaller(end - strip, width));
    }
  });
}

}  // namespace
}  // namespace qlora::cpu
