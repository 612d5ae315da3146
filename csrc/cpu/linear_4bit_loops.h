// The loops of linear_4bit around the kernel of one instruction set. A file of kernels includes this inside its target
// region, so that everything here is compiled for it.
//
// Isa has
//   kMostRows      rows of x that are multiplied at once
//   kRowsOfW       rows of W that are multiplied by x as it is loaded once
//   kChunk         weights of each that are decoded at a time
//   Element        of x as it is multiplied
//   element        of a chunk of x that lies at place i
//   Vector         fp32 sums; a lane's weights of a chunk are of one run of 32, so that they share an absmax
//   decode_absmax  absmax of blocks as numbers; writes up to a multiple of 64, or less
//   multiply       a chunk of W times the chunk of each row of x, each lane its own sum, not yet scaled
//   multiply_scaled  if there is one for so many rows of x: likewise of one row of W, scaled, onto the sums
//   Lanes          which of a chunk's absmax each lane takes, and `scales`, which hands them out
//   copy_bytes     if a chunk is more than a run: to a chunk, with zeros behind them; and `scales` with zeros for lanes
//                  whose runs are not among the first so many
//   multiply_add   a times b plus c, fused where that is an instruction
//   add_lanes      the totals of as many sums as a Vector has lanes
namespace qlora::cpu {
namespace {

constexpr std::int64_t kRun = kMinBlocksize;
constexpr std::int64_t kRowBlock = kFewRowsBoundary;  // rows of W that meet a segment of x while it is in L1
constexpr std::int64_t kLine = 64;                    // bytes of a cache line
constexpr std::int64_t kBytesToL1 = 4096;             // ahead, that are fetched
constexpr std::int64_t kBytesToL2 = 12288;            // likewise; straight to the L1 memory is read more slowly
constexpr std::int64_t kMaxSegment = 4096;            // weights
constexpr std::int64_t kAbsmaxBehind = 64;  // numbers that decode_absmax may write, or `scales` read, beyond the last

// Weights of a row that are multiplied at a time: their part of x, so many bytes a weight, stays in the L1, and a third
// of that is left for W.
inline std::int64_t segment(std::int64_t bytes) {
  std::int64_t weights = kMaxSegment;
  while (3 * weights * bytes > 2 * l1_bytes()) weights /= 2;
  return weights;
}

// For an Isa: decodes one number after the other. A vector of them would wait for a gather, or for scalars to reach the
// L1.
struct AbsmaxInTurn {
  static void decode_absmax(const Packed4bit& w, std::int64_t first, std::int64_t count, float* absmax) {
    if (w.nested_absmax == nullptr) {
      __builtin_memcpy(absmax, static_cast<const float*>(w.absmax) + first,
                       static_cast<std::size_t>(count) * sizeof(float));
      return;
    }
    const auto* codes = static_cast<const std::uint8_t*>(w.absmax);
    const float offset = *w.nested_offset;
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t group = (first + i) / kNestedBlocksize, rest = (group + 1) * kNestedBlocksize - first;
      const float scale = w.nested_absmax[group];
      for (const std::int64_t end = smaller(rest, count); i < end; ++i) {
        absmax[i] = decode_dynamic(kDynamicCodebook.value[codes[first + i]], scale, offset);
      }
    }
  }
};

// The absmax of `count` weights, from the k-th on, of each of so many rows of W, row after row. Those of as many next
// rows are fetched, as their weights are, which would come before them.
template <typename Isa>
inline void decode_absmax_of_rows(const Packed4bit& w, std::int64_t first, std::int64_t rows, std::int64_t K,
                                  std::int64_t k, std::int64_t count, float* absmax) {
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(w.blocksize));
  const std::int64_t bytes = w.nested_absmax == nullptr ? 4 : 1;
  const bool whole = count == K;  // rows, whose absmax lie side by side
  const std::int64_t blocks = ((count + w.blocksize - 1) >> shift) * (whole ? rows : 1);
  for (std::int64_t row = 0; row < (whole ? 1 : rows); ++row) {
    const std::int64_t block = ((first + row) * K + k) >> shift, next = block + ((rows * K) >> shift);
    for (std::int64_t byte = next * bytes; byte < (next + blocks) * bytes; byte += kLine) {
      __builtin_prefetch(static_cast<const char*>(w.absmax) + byte);
    }
    Isa::decode_absmax(w, block, blocks, absmax + row * blocks);
  }
}

// One or more rows of W, and of absmax as decoded, each so far from the next.
struct RowsOfW {
  const std::uint8_t* packed;
  std::int64_t stride;
  const float* absmax;
  std::int64_t absmax_stride;
};

// A chunk of Isa::kRowsOfW rows of W times the same part of x, onto the sums; `scales` hands out the absmax.
template <typename Isa, int kRows, typename Scales>
[[gnu::always_inline]] inline void multiply_chunk(const Isa& isa, const RowsOfW& w, const typename Isa::Element* x,
                                                  const Scales& scales,
                                                  typename Isa::Vector (&sum)[Isa::kRowsOfW][kRows]) {
  if constexpr (requires { isa.multiply_scaled(w.packed, scales(w.absmax), x, sum[0]); }) {
    static_assert(Isa::kRowsOfW == 1);
    isa.multiply_scaled(w.packed, scales(w.absmax), x, sum[0]);
  } else {
    typename Isa::Vector products[Isa::kRowsOfW][kRows];
    isa.multiply(w.packed, w.stride, x, products);
    for (int r = 0; r < Isa::kRowsOfW; ++r) {
      const typename Isa::Vector scale = scales(w.absmax + r * w.absmax_stride);
      for (int m = 0; m < kRows; ++m) sum[r][m] = Isa::multiply_add(scale, products[r][m], sum[r][m]);
    }
  }
}

// The end of the rows, of less than a chunk.
template <typename Isa, int kRows>
[[gnu::noinline]] void multiply_end(const Isa& isa, const typename Isa::Lanes& lanes, const RowsOfW& w,
                                    const typename Isa::Element* x, std::int64_t count,
                                    typename Isa::Vector (&sum)[Isa::kRowsOfW][kRows]) {
  std::uint8_t padded[Isa::kRowsOfW][Isa::kChunk / 2];
  for (int r = 0; r < Isa::kRowsOfW; ++r) Isa::copy_bytes(w.packed + r * w.stride, count / 2, padded[r]);
  multiply_chunk<Isa, kRows>(
      isa, {padded[0], sizeof padded[0], w.absmax, w.absmax_stride}, x,
      [&](const float* absmax) { return lanes.scales(absmax, count / kRun); }, sum);
}

// How far apart a row of a segment lies from the one that will be met so many bytes later.
struct Ahead {
  std::int64_t to_l1, to_l2;

  Ahead(std::int64_t segment_bytes, std::int64_t row_bytes)
      : to_l1(ceil_div(kBytesToL1, segment_bytes) * row_bytes),
        to_l2(ceil_div(kBytesToL2, segment_bytes) * row_bytes) {}
};

// `count` weights of each of the rows; those ahead of them are fetched meanwhile.
template <typename Isa, int kRows>
inline void multiply_segment(const Isa& isa, const typename Isa::Lanes& lanes, RowsOfW w, std::int64_t row_bytes,
                             const Ahead& ahead, int shift, const typename Isa::Element* x, std::int64_t count,
                             typename Isa::Vector (&sums)[kRows][kRowBlock], std::int64_t row) {
  constexpr int kRowsOfW = Isa::kRowsOfW;
  typename Isa::Vector sum[kRowsOfW][kRows];
  for (auto& of_row : sum) {
    for (auto& of_x : of_row) of_x = typename Isa::Vector{};
  }
  const auto at = [&](std::int64_t k) {
    return RowsOfW{w.packed + k / 2, w.stride, w.absmax + (k >> shift), w.absmax_stride};
  };
  constexpr std::int64_t kBytes = Isa::kChunk / 2 < kLine ? kLine : Isa::kChunk / 2;  // of each row at a time
  const auto fetch_ahead = [&](std::int64_t k) {
    for (int r = 0; r < kRowsOfW; ++r) {
      const std::uint8_t* chunk = w.packed + k / 2 + r * row_bytes;
      for (std::int64_t byte = 0; byte < kBytes; byte += kLine) {
        __builtin_prefetch(chunk + byte + ahead.to_l2, 0, 2);
        __builtin_prefetch(chunk + byte + ahead.to_l1, 0, 3);
      }
    }
  };
  const auto multiply = [&](std::int64_t k) __attribute__((always_inline)) {
    multiply_chunk<Isa, kRows>(
        isa, at(k), x + k * kRows, [&](const float* absmax) { return lanes.scales(absmax); }, sum);
  };
  std::int64_t k = 0;
  for (; k + 2 * kBytes <= count; k += 2 * kBytes) {
    fetch_ahead(k);
#pragma GCC unroll 2
    for (std::int64_t chunk = 0; chunk < 2 * kBytes; chunk += Isa::kChunk) multiply(k + chunk);
  }
  if (k < count) fetch_ahead(k);
  for (; k + Isa::kChunk <= count; k += Isa::kChunk) multiply(k);
  if constexpr (Isa::kChunk > kRun) {
    if (k < count) multiply_end<Isa, kRows>(isa, lanes, at(k), x + k * kRows, count - k, sum);
  }
  // Chains are no longer than a segment: as long as a row, they had up to three times torch's error.
  for (int r = 0; r < kRowsOfW; ++r) {
    for (int m = 0; m < kRows; ++m) sums[m][row + r] += sum[r][m];
  }
}

// The y of kRowBlock rows of W, or of the `rows` that there are.
template <typename Isa, int kRows>
void finish_rows(const FewRows& p, std::int64_t first, std::int64_t rows,
                 const typename Isa::Vector (&sums)[kRows][kRowBlock]) {
  constexpr std::int64_t kLanes = sizeof(typename Isa::Vector) / 4;
  for (int m = 0; m < kRows; ++m) {
    float totals[kRowBlock];
    for (std::int64_t row = 0; row < kRowBlock; row += kLanes) {
      const typename Isa::Vector total = Isa::add_lanes(sums[m] + row);
      __builtin_memcpy(totals + row, &total, sizeof total);
    }
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t n = first + row;
        const float added = p.addend == nullptr ? 0.0f : p.addend[m * p.addend_stride + n];
        static_cast<T*>(p.y)[m * p.N + n] = round_to<T>(totals[row] + added);
      }
    });
  }
}

template <typename Isa, int kRows>
void multiply_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t longest = segment(kRows * static_cast<std::int64_t>(sizeof(typename Isa::Element)));
  const Isa isa(p.w.quant_type);
  const typename Isa::Lanes lanes(p.w.blocksize);
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(p.w.blocksize));
  for (std::int64_t first = begin; first < end; first += kRowBlock) {
    const std::int64_t rows = smaller(end - first, kRowBlock);
    typename Isa::Vector sums[kRows][kRowBlock];
    for (auto& of_x : sums) {
      for (auto& sum : of_x) sum = typename Isa::Vector{};
    }
    for (std::int64_t k = 0; k < p.K; k += longest) {
      const std::int64_t count = smaller(p.K - k, longest);
      const std::int64_t blocks = (count + p.w.blocksize - 1) >> shift;
      const Ahead ahead(count / 2, p.K / 2);
      float absmax[kRowBlock * (kMaxSegment / kRun) + kAbsmaxBehind];
      decode_absmax_of_rows<Isa>(p.w, first, rows, p.K, k, count, absmax);
      const auto* x = static_cast<const typename Isa::Element*>(p.x) + k * kRows;
      for (std::int64_t row = 0; row < rows; row += Isa::kRowsOfW) {
        RowsOfW w{p.w.packed + ((first + row) * p.K + k) / 2, p.K / 2, absmax + row * blocks, blocks};
        if (row + Isa::kRowsOfW > rows) w.stride = w.absmax_stride = 0;  // the last row is its own neighbour
        multiply_segment<Isa, kRows>(isa, lanes, w, p.K / 2, ahead, shift, x, count, sums, row);
      }
    }
    finish_rows<Isa, kRows>(p, first, rows, sums);
  }
}

template <typename Isa>
struct ChunkOrder {
  std::uint8_t element[Isa::kChunk] = {};

  constexpr ChunkOrder() {
    for (int i = 0; i < Isa::kChunk; ++i) element[i] = static_cast<std::uint8_t>(Isa::element(i));
  }
};

// x chunk by chunk, of each all rows.
template <typename Isa>
void arrange_chunks(const void* x, DType dtype, std::int64_t rows, std::int64_t K, void* arranged) {
  using To = typename Isa::Element;
  static constexpr ChunkOrder<Isa> kOrder;
  with_type(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(x);
    for (std::int64_t m = 0; m < rows; ++m, from += K) {
      To* to = static_cast<To*>(arranged) + m * Isa::kChunk;
      for (std::int64_t k = 0; k < K; k += Isa::kChunk, to += rows * Isa::kChunk) {
        const std::int64_t count = smaller(K - k, Isa::kChunk);
        To chunk[Isa::kChunk] = {};
        for (std::int64_t i = 0; i < count; ++i) {
          if constexpr (std::is_same_v<decltype(type), To>) {
            chunk[i] = from[k + i];  // nothing to round
          } else {
            chunk[i] = round_to<To>(to_float(from[k + i]));
          }
        }
        for (int i = 0; i < Isa::kChunk; ++i) to[i] = chunk[kOrder.element[i]];
      }
    }
  });
}

template <typename Isa, int kRows = Isa::kMostRows>
void multiply_group(const FewRows& p, std::int64_t begin, std::int64_t end) {
  if constexpr (kRows > 1) {
    if (p.M < kRows) return multiply_group<Isa, kRows - 1>(p, begin, end);
  }
  multiply_rows<Isa, kRows>(p, begin, end);
}

// There is more than one group only where W has fewer rows than a tile (linear_4bit_tiles_avx512.h).
template <typename Isa>
void multiply_few_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kBytes = sizeof(typename Isa::Element);
  const std::int64_t x_row = ceil_div(p.K, Isa::kChunk) * Isa::kChunk * kBytes;
  each_group(p.M, Isa::kMostRows, [&](std::int64_t m, std::int64_t rows) {
    FewRows group = p;
    group.x = static_cast<const char*>(p.x) + m * x_row;
    group.addend = p.addend == nullptr ? nullptr : p.addend + m * p.addend_stride;
    group.y = static_cast<char*>(p.y) + m * p.N * itemsize(p.dtype);
    group.M = rows;
    multiply_group<Isa>(group, begin, end);
  });
}

template <typename Isa>
constexpr FewRowsKernel kAlongRows{Isa::kChunk, sizeof(typename Isa::Element), Isa::kMostRows, arrange_chunks<Isa>,
                                   multiply_few_rows<Isa>};

}  // namespace
}  // namespace qlora::cpu
