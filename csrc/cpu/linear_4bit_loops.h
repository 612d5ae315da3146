// The loops of linear_4bit around the kernel of one instruction set. A file of kernels includes this inside its target
// region, so that everything here is compiled for it.
//
// Isa has
//   kRowsOfW       rows of W that are multiplied by x as it is loaded once
//   kChunk         weights of each that are decoded at a time
//   Element        of x as arrange_x leaves it
//   Vector         fp32 sums; a lane's weights of a chunk are of one run of 32, so that they share an absmax
//   decode_absmax  absmax of blocks as numbers, and zeros where a chunk goes on beyond the last
//   multiply       a chunk of W times the chunk of each row of x, each lane its own sum, not yet scaled
//   copy_bytes     to a chunk, with zeros behind them
//   Lanes          which of a chunk's absmax each lane takes, and `scales`, which hands them out
//   add_lanes      the totals of as many sums as a Vector has lanes
namespace qlora::cpu {
namespace {

constexpr std::int64_t kRun = 32;           // the smallest blocksize
constexpr std::int64_t kRowBlock = 16;      // rows of W that meet a segment of x while it is in L1
constexpr std::int64_t kRowsToL1 = 2;       // ahead, that are fetched
constexpr std::int64_t kRowsToL2 = 4;       // likewise; straight to the L1 memory is read more slowly
constexpr std::int64_t kMaxSegment = 4096;  // weights
constexpr std::int64_t kMostScales = 8;     // that `scales` may read: a chunk of 256 weights in blocks of 32

// Weights of a row that are multiplied at a time: their part of x, so many bytes a weight, stays in the L1, and a third
// of that is left for W.
inline std::int64_t segment(std::int64_t bytes) {
  std::int64_t weights = kMaxSegment;
  while (3 * weights * bytes > 2 * l1_bytes()) weights /= 2;
  return weights;
}

// `count` weights of Isa::kRowsOfW rows of W, from the k-th of row n on, times the same part of x, onto the sums. The
// rows are so many bytes apart; those ahead are fetched meanwhile.
template <typename Isa, int kRows, std::int64_t kAbsmax>
inline void multiply_segment(const Isa& isa, const typename Isa::Lanes& lanes, const FewRows& p, std::int64_t n,
                             std::int64_t k, std::int64_t count, std::int64_t stride, const float (*absmax)[kAbsmax],
                             typename Isa::Vector (&sums)[kRows][kRowBlock], std::int64_t row) {
  constexpr int kRowsOfW = Isa::kRowsOfW;
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(p.w.blocksize));
  const auto* x = static_cast<const typename Isa::Element*>(p.x) + k * kRows;
  const std::uint8_t* packed = p.w.packed + (n * p.K + k) / 2;
  using Vector = typename Isa::Vector;
  Vector sum[kRowsOfW][kRows];
  for (int r = 0; r < kRowsOfW; ++r) {
    for (int m = 0; m < kRows; ++m) sum[r][m] = sums[m][row + r];
  }
  const auto multiply_chunk = [&](const std::uint8_t* from, std::int64_t from_stride, std::int64_t at) {
    Vector products[kRowsOfW][kRows];
    isa.multiply(from, from_stride, x + at * kRows, products);
    for (int r = 0; r < kRowsOfW; ++r) {
      const Vector scales = lanes.scales(absmax[r] + (at >> shift));
      for (int m = 0; m < kRows; ++m) sum[r][m] = Isa::multiply_add(scales, products[r][m], sum[r][m]);
    }
  };
  std::int64_t at = 0;
  for (; at + Isa::kChunk <= count; at += Isa::kChunk) {
    for (int r = 0; r < kRowsOfW; ++r) {
      for (std::int64_t byte = 0; byte < Isa::kChunk / 2; byte += 64) {
        __builtin_prefetch(packed + at / 2 + byte + (kRowsToL2 + r) * p.K / 2, 0, 2);
        __builtin_prefetch(packed + at / 2 + byte + (kRowsToL1 + r) * p.K / 2, 0, 3);
      }
    }
    multiply_chunk(packed + at / 2, stride, at);
  }
  if (at < count) {  // the end of a row
    std::uint8_t padded[kRowsOfW][Isa::kChunk / 2];
    for (int r = 0; r < kRowsOfW; ++r) {
      Isa::copy_bytes(packed + r * stride + at / 2, (count - at) / 2, padded[r]);
    }
    multiply_chunk(padded[0], sizeof padded[0], at);
  }
  for (int r = 0; r < kRowsOfW; ++r) {
    for (int m = 0; m < kRows; ++m) sums[m][row + r] = sum[r][m];
  }
}

// The y of kRowBlock rows of W, or of the `rows` that there are.
template <typename Isa, int kRows, typename T>
void finish_rows(const FewRows& p, std::int64_t first, std::int64_t rows,
                 const typename Isa::Vector (&sums)[kRows][kRowBlock]) {
  constexpr std::int64_t kLanes = sizeof(typename Isa::Vector) / 4;
  for (int m = 0; m < kRows; ++m) {
    float totals[kRowBlock];
    for (std::int64_t row = 0; row < kRowBlock; row += kLanes) {
      const typename Isa::Vector total = Isa::add_lanes(sums[m] + row);
      __builtin_memcpy(totals + row, &total, sizeof total);
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t n = first + row;
      const float added = p.addend == nullptr ? 0.0f : p.addend[m * p.addend_stride + n];
      static_cast<T*>(p.y)[m * p.N + n] = round_to<T>(totals[row] + added);
    }
  }
}

template <typename Isa, int kRows, typename T>
void multiply_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  const std::int64_t longest = segment(kRows * static_cast<std::int64_t>(sizeof(typename Isa::Element)));
  const Isa isa(p.w.quant_type);
  const typename Isa::Lanes lanes(p.w.blocksize);
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(p.w.blocksize));
  for (std::int64_t first = begin; first < end; first += kRowBlock) {
    const std::int64_t rows = end - first < kRowBlock ? end - first : kRowBlock;
    typename Isa::Vector sums[kRows][kRowBlock];
    for (auto& of_x : sums) {
      for (auto& sum : of_x) sum = Isa::zero();
    }
    for (std::int64_t k = 0; k < p.K; k += longest) {
      const std::int64_t count = p.K - k < longest ? p.K - k : longest;
      const std::int64_t blocks = (count + p.w.blocksize - 1) >> shift;
      for (std::int64_t row = 0; row < rows; row += Isa::kRowsOfW) {
        float absmax[Isa::kRowsOfW][kMaxSegment / kRun + kMostScales];
        const std::int64_t stride = row + Isa::kRowsOfW <= rows ? p.K : 0;  // the last row may be its own neighbour
        for (int r = 0; r < Isa::kRowsOfW; ++r) {
          Isa::decode_absmax(p.w, ((first + row) * p.K + r * stride + k) >> shift, blocks, absmax[r]);
        }
        multiply_segment<Isa, kRows>(isa, lanes, p, first + row, k, count, stride / 2, absmax, sums, row);
      }
    }
    finish_rows<Isa, kRows, T>(p, first, rows, sums);
  }
}

template <typename Isa>
void multiply_few_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr void (*kKernels[])(const FewRows&, std::int64_t, std::int64_t) = {
        multiply_rows<Isa, 1, T>, multiply_rows<Isa, 2, T>, multiply_rows<Isa, 3, T>, multiply_rows<Isa, 4, T>};
    kKernels[p.M - 1](p, begin, end);
  });
}

}  // namespace
}  // namespace qlora::cpu
