// dequantize_4bit: out[i] = round_to_dtype(value[code i] * absmax of i's block), one rounding.
//
// The vector kernels decode a block through the table of its 16 possible results, so the products and their rounding
// are computed 16 times a block instead of once a weight, and the result is the same bits.
#include <algorithm>

#include "dequantize_4bit.h"
#include "path.h"
#include "simd_portable.h"

namespace qlora::cpu {
namespace {

// Elements [begin, end) of one block.
template <typename T>
void dequantize_part(const Packed4bit& w, std::int64_t begin, std::int64_t end, T* out) {
  const float absmax = block_absmax(w, begin / w.blocksize);
  const auto decode_one = [&](std::int64_t i) {
    return decode<T>(codebook(w.quant_type), unpack(w.packed, i), absmax);
  };
  if (begin < end && begin % 2 != 0) *out++ = decode_one(begin++);
  const CodePairs& pairs = code_pairs(w.quant_type);
  constexpr std::int64_t kLanes = PortableVectors::kLanes;
  for (; begin + kLanes <= end; begin += kLanes, out += kLanes) {
    PortableVectors::store(out, pairs(w.packed[begin / 2], w.packed[begin / 2 + 1]) * absmax);
  }
  while (begin < end) *out++ = decode_one(begin++);
}

template <typename T>
void dequantize_portable(const Packed4bit& w, std::int64_t begin, std::int64_t end, T* out) {
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t block_end = std::min(end, (i / w.blocksize + 1) * w.blocksize);
    dequantize_part(w, i, block_end, out + (i - begin));
    i = block_end;
  }
}

}  // namespace

void dequantize_4bit(const Packed4bit& w, std::int64_t begin, std::int64_t end, DType dtype, void* out,
                     [[maybe_unused]] bool past_caches) {
  with_type(dtype, [&](auto type) {
    auto* values = static_cast<decltype(type)*>(out);
#if defined(__x86_64__)
    const std::int64_t first = ceil_div(begin, w.blocksize);  // whole blocks [first, last)
    const std::int64_t last = end / w.blocksize;
    const Path chosen = path();
    if (chosen != Path::Portable && first < last) {
      const auto vector_kernel = chosen == Path::Avx2 ? dequantize_4bit_avx2 : dequantize_4bit_avx512;
      dequantize_portable(w, begin, first * w.blocksize, values);
      auto* blocks = values + (first * w.blocksize - begin);
      const bool aligned = reinterpret_cast<std::uintptr_t>(blocks) % 64 == 0;
      vector_kernel(w, first, last, dtype, blocks, past_caches && aligned);
      values += last * w.blocksize - begin;
      begin = last * w.blocksize;
    }
#endif
    dequantize_portable(w, begin, end, values);
  });
}

}  // namespace qlora::cpu
