// The loops of linear_4bit around the kernel of one instruction set. A file of kernels includes this inside its target
// region, so that everything here is compiled for it.
//
// Isa has
//   kChunk       weights that are decoded at a time
//   Element      of x as arrange_x leaves it
//   Vector       fp32 sums; a lane's weights of a chunk are of one run of 32, so that they share an absmax
//   multiply     a chunk of W times the chunk of each row of x, each lane its own sum, not yet scaled
//   Lanes        which of a chunk's absmax each lane takes, and `scales`, which hands them out
namespace qlora::cpu {
namespace {

constexpr std::int64_t kRun = 32;           // the smallest blocksize
constexpr std::int64_t kRowBlock = 16;      // rows of W that meet a segment of x while it is in L1
constexpr std::int64_t kRowsAhead = 4;      // that are fetched from memory
constexpr std::int64_t kMaxSegment = 4096;  // weights
constexpr std::int64_t kMostScales = 8;     // that `scales` may read: a chunk of 256 weights in blocks of 32

// Weights of a row that are multiplied at a time: half of a small L1 holds their part of x.
template <typename Element, int kRows>
constexpr std::int64_t segment() {
  std::int64_t weights = kMaxSegment;
  while (weights * kRows * static_cast<std::int64_t>(sizeof(Element)) > 16384) weights /= 2;
  return weights;
}

inline void prefetch_absmax(const Packed4bit& w, std::int64_t first, std::int64_t count) {
  const std::int64_t bytes = w.nested_absmax == nullptr ? 4 : 1;
  const char* const from = static_cast<const char*>(w.absmax) + first * bytes;
  for (std::int64_t byte = 0; byte < count * bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

// Looks up the 8-bit codes of `count` blocks from `first` on, or copies their absmax if they have none.
inline void look_up_absmax(const Packed4bit& w, std::int64_t first, std::int64_t count, float* absmax) {
  if (w.nested_absmax == nullptr) {
    __builtin_memcpy(absmax, static_cast<const float*>(w.absmax) + first, static_cast<std::size_t>(count) * 4);
    return;
  }
  const auto* codes = static_cast<const std::uint8_t*>(w.absmax) + first;
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < count; ++i) {
    std::size_t code = codes[i];
    asm("" : "+r"(code));  // GCC would make vectors of the codes, only to take them apart again
    __builtin_memcpy(absmax + i, kDynamicCodebook.value + code, 4);
  }
}

// What the codes mean. Apart from the lookups, as a vector cannot be loaded before the stores of its parts are done.
inline void scale_absmax(const Packed4bit& w, std::int64_t first, std::int64_t count, float* absmax) {
  if (w.nested_absmax == nullptr) return;
  const float offset = *w.nested_offset;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t group = (first + i) / kNestedBlocksize, group_end = (group + 1) * kNestedBlocksize - first;
    const float nested_absmax = w.nested_absmax[group];
    for (const std::int64_t end = group_end < count ? group_end : count; i < end; ++i) {
      absmax[i] = decode_dynamic(absmax[i], nested_absmax, offset);
    }
  }
}

// `count` weights of row n, from the k-th on, times the same part of x, onto the sums. Those of a later row are fetched
// to the L2 meanwhile: to the L1, or by the hardware alone, memory is read at half the speed.
template <typename Isa, int kRows>
inline void multiply_segment(const Isa& isa, const typename Isa::Lanes& lanes, const FewRows& p, std::int64_t n,
                             std::int64_t k, std::int64_t count, const float* absmax, typename Isa::Vector* sums) {
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(p.w.blocksize));
  const auto* x = static_cast<const typename Isa::Element*>(p.x) + k * kRows;
  const std::uint8_t* packed = p.w.packed + (n * p.K + k) / 2;
  using Vector = typename Isa::Vector;
  Vector sum[kRows];
  for (int m = 0; m < kRows; ++m) sum[m] = sums[m];
  for (std::int64_t at = 0; at < count; at += Isa::kChunk) {
    std::uint8_t padded[Isa::kChunk / 2];
    const std::uint8_t* from = packed + at / 2;
    if (count - at < Isa::kChunk) {  // the end of a row
      __builtin_memset(padded, 0, sizeof padded);
      __builtin_memcpy(padded, from, static_cast<std::size_t>((count - at) / 2));
      from = padded;
    }
    for (std::int64_t byte = 0; byte < Isa::kChunk / 2; byte += 64) {
      __builtin_prefetch(packed + at / 2 + byte + kRowsAhead * p.K / 2, 0, 2);
    }
    Vector products[kRows];
    isa.template multiply<kRows>(from, x + at * kRows, products);
    const Vector scales = lanes.scales(absmax + (at >> shift));
    for (int m = 0; m < kRows; ++m) sum[m] = Isa::multiply_add(scales, products[m], sum[m]);
  }
  for (int m = 0; m < kRows; ++m) sums[m] = sum[m];
}

template <typename Isa, int kRows, typename T>
void multiply_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kSegment = segment<typename Isa::Element, kRows>();
  const Isa isa(p.w.quant_type);
  const typename Isa::Lanes lanes(p.w.blocksize);
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(p.w.blocksize));
  for (std::int64_t first = begin; first < end; first += kRowBlock) {
    const std::int64_t rows = end - first < kRowBlock ? end - first : kRowBlock;
    typename Isa::Vector sums[kRowBlock][kRows];
    for (auto& row : sums) {
      for (auto& sum : row) sum = Isa::zero();
    }
    for (std::int64_t k = 0; k < p.K; k += kSegment) {
      const std::int64_t count = p.K - k < kSegment ? p.K - k : kSegment;
      const std::int64_t blocks = (count + p.w.blocksize - 1) >> shift;
      float absmax[kRowBlock][kSegment / kRun + kMostScales];
      for (std::int64_t row = 0; row < rows; ++row) {
        prefetch_absmax(p.w, ((first + row + kRowBlock) * p.K + k) >> shift, blocks);
        look_up_absmax(p.w, ((first + row) * p.K + k) >> shift, blocks, absmax[row]);
      }
      for (std::int64_t row = 0; row < rows; ++row) {
        scale_absmax(p.w, ((first + row) * p.K + k) >> shift, blocks, absmax[row]);
        // A chunk beyond the end of a row is scaled by zeros.
        for (std::int64_t i = 0; i < kMostScales; ++i) absmax[row][blocks + i] = 0.0f;
      }
      for (std::int64_t row = 0; row < rows; ++row) {
        multiply_segment<Isa, kRows>(isa, lanes, p, first + row, k, count, absmax[row], sums[row]);
      }
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t n = first + row;
      for (int m = 0; m < kRows; ++m) {
        const float added = p.addend == nullptr ? 0.0f : p.addend[m * p.addend_stride + n];
        static_cast<T*>(p.y)[m * p.N + n] = round_to<T>(Isa::add_lanes(sums[row][m]) + added);
      }
    }
  }
}

template <typename Isa>
void multiply_few_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr void (*kKernels[kMostAtOnce])(const FewRows&, std::int64_t, std::int64_t) = {
        multiply_rows<Isa, 1, T>, multiply_rows<Isa, 2, T>, multiply_rows<Isa, 3, T>, multiply_rows<Isa, 4, T>,
        multiply_rows<Isa, 5, T>, multiply_rows<Isa, 6, T>, multiply_rows<Isa, 7, T>, multiply_rows<Isa, 8, T>};
    kKernels[p.M - 1](p, begin, end);
  });
}

}  // namespace
}  // namespace qlora::cpu
