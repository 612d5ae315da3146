// quantize_4bit: blockwise 4-bit quantization (QLoRA paper, section 3; the bytes: csrc/codec.h).
//
//   absmax[b] = max |w| over block b;  code[i] = number of bounds below w[i] / absmax[b], as that rank's code
#include <algorithm>

#include "path.h"
#include "quantize.h"

namespace qlora::cpu {
namespace {

template <typename T>
void quantize_block(const T* weight, std::int64_t count, const Codebook& book, std::uint8_t* packed, float* absmax) {
  std::uint32_t largest = 0;  // of |w|, as bits: integers order floats of one sign, and NaN last
  for (std::int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(to_float(weight[i])) & 0x7fffffffu);
  }
  *absmax = std::bit_cast<float>(largest);
  const float inverse = inverse_absmax(*absmax);
  for (std::int64_t i = 0; i < count; i += 2) {
    const std::uint8_t even = encode(book, to_float(weight[i]) * inverse);
    const std::uint8_t odd = encode(book, i + 1 < count ? to_float(weight[i + 1]) * inverse : 0.0f);
    packed[i / 2] = pack(even, odd);
  }
}

}  // namespace

void quantize_4bit(const void* weight, DType dtype, std::int64_t n, std::int64_t blocksize, QuantType quant_type,
                   std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax) {
#if defined(__x86_64__)
  if (const Path chosen = path(); chosen != Path::Portable) {
    const std::int64_t whole = std::max(begin, std::min(end, n / blocksize));
    const auto vector_kernel = chosen == Path::Avx2 ? quantize_4bit_avx2 : quantize_4bit_avx512;
    vector_kernel(weight, dtype, blocksize, quant_type, begin, whole, packed, absmax);
    begin = whole;
  }
#endif
  with_type(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(weight);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * blocksize;
      quantize_block(values + first, std::min(blocksize, n - first), codebook(quant_type), packed + first / 2,
                     absmax + block);
    }
  });
}

}  // namespace qlora::cpu
