// The loops of linear_4bit around the kernel of one instruction set. A file of kernels includes this inside its target
// region, so that everything here is compiled for it.
//
// Isa has
//   kChunk       weights that are decoded at a time
//   Element      of x as arrange_x leaves it
//   Vector       fp32 sums, whose lanes are in the order of the chunk's weights: each run of 32 weights, which share an
//                absmax, has lanes of its own
//   decode       the codes' values of a chunk
//   dot          a chunk of x times those, each lane its own sum
//   scales       a chunk's absmax, one for each 32 weights, in the lanes of those weights
namespace qlora::cpu {
namespace {

constexpr std::int64_t kSegment = 4096;  // weights of a row whose absmax are decoded at a time
constexpr std::int64_t kRun = 32;        // the smallest blocksize

// The absmax of `count` weights from `first` on, one for each 32 of them, and zeros to the end of the segment.
inline void decode_absmax(const Packed4bit& w, std::int64_t first, std::int64_t count, float* absmax) {
  const int shift = __builtin_ctzll(static_cast<std::uint64_t>(w.blocksize));
  const float* const begin = absmax;
  for (std::int64_t at = first; at < first + count;) {
    const std::int64_t block_end = ((at >> shift) + 1) << shift;
    const std::int64_t end = block_end < first + count ? block_end : first + count;
    const float value = block_absmax(w, at >> shift);
    for (; at < end; at += kRun) *absmax++ = value;
  }
  while (absmax < begin + kSegment / kRun) *absmax++ = 0.0f;
}

template <typename Isa, int kRows, typename T>
void multiply_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  const Isa isa(p.w.quant_type);
  const std::int64_t x_stride = (p.K + Isa::kChunk - 1) / Isa::kChunk * Isa::kChunk;
  const auto* x = static_cast<const typename Isa::Element*>(p.x);
  for (std::int64_t n = begin; n < end; ++n) {
    typename Isa::Vector sum[kRows];
    for (int m = 0; m < kRows; ++m) sum[m] = Isa::zero();
    for (std::int64_t k = 0; k < p.K; k += kSegment) {
      const std::int64_t first = n * p.K + k;
      const std::int64_t count = p.K - k < kSegment ? p.K - k : kSegment;
      float absmax[kSegment / kRun];
      decode_absmax(p.w, first, count, absmax);
      const std::uint8_t* packed = p.w.packed + first / 2;
      for (std::int64_t at = 0; at < count; at += Isa::kChunk) {
        std::uint8_t padded[Isa::kChunk / 2];
        const std::uint8_t* from = packed + at / 2;
        if (count - at < Isa::kChunk) {  // the end of a row
          __builtin_memset(padded, 0, sizeof padded);
          __builtin_memcpy(padded, from, static_cast<std::size_t>((count - at) / 2));
          from = padded;
        }
        const auto weights = isa.decode(from);
        const auto scales = Isa::scales(absmax + at / kRun);
        for (int m = 0; m < kRows; ++m) {
          sum[m] = Isa::multiply_add(scales, Isa::dot(weights, x + m * x_stride + k + at), sum[m]);
        }
      }
    }
    for (int m = 0; m < kRows; ++m) {
      const float total = Isa::add_lanes(sum[m]);
      const float added = p.addend == nullptr ? 0.0f : p.addend[m * p.addend_stride + n];
      static_cast<T*>(p.y)[m * p.N + n] = round_to<T>(total + added);
    }
  }
}

template <typename Isa>
void multiply_few_rows(const FewRows& p, std::int64_t begin, std::int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr void (*kKernels[kMostFewRows])(const FewRows&, std::int64_t, std::int64_t) = {
        multiply_rows<Isa, 1, T>, multiply_rows<Isa, 2, T>, multiply_rows<Isa, 3, T>, multiply_rows<Isa, 4, T>,
        multiply_rows<Isa, 5, T>, multiply_rows<Isa, 6, T>, multiply_rows<Isa, 7, T>, multiply_rows<Isa, 8, T>};
    kKernels[p.M - 1](p, begin, end);
  });
}

}  // namespace
}  // namespace qlora::cpu
