// quantize_4bit: blockwise 4-bit quantization (QLoRA paper, section 3; the bytes: csrc/codec.h).
//
//   absmax[b] = max |w| over block b;  code[i] = number of bounds below w[i] / absmax[b], as that rank's code
#include <algorithm>

#include "path.h"
#include "quantize.h"
#include "simd_portable.h"

namespace qlora::cpu {
namespace {

// |x| as bits: integers order floats of one sign, and NaN last.
std::int32_t magnitude(float x) { return std::bit_cast<std::int32_t>(x) & 0x7fffffff; }
template <typename T>
std::int16_t magnitude(T x) {
  return static_cast<std::int16_t>(x.bits & 0x7fff);
}

using Vectors = PortableVectors;

constexpr int kVectors = 4;  // at once: a rank waits for the comparison before
constexpr std::int64_t kAtOnce = kVectors * Vectors::kLanes;

// The codes of kAtOnce weights.
template <typename T>
void encode_at_once(const T* weight, float inverse, const Codebook& book, std::uint8_t* packed) {
  Vectors::Vector x[kVectors];
  for (int i = 0; i < kVectors; ++i) x[i] = Vectors::load(weight + i * Vectors::kLanes) * inverse;
  using Ranks = decltype(x[0] > x[0]);
  Ranks rank[kVectors] = {};
  for (const float bound : book.bound) {
    for (int i = 0; i < kVectors; ++i) rank[i] -= x[i] > Vectors::splat(bound);  // true is -1
  }
  for (std::int64_t i = 0; i < kAtOnce; i += 2) {
    const Ranks& of_four = rank[i / Vectors::kLanes];
    const auto code = [&](std::int64_t lane) { return book.code_of_rank[of_four[lane % Vectors::kLanes]]; };
    packed[i / 2] = pack(code(i), code(i + 1));
  }
}

template <typename T>
void quantize_block(const T* weight, std::int64_t count, const Codebook& book, std::uint8_t* packed, float* absmax) {
  auto largest = magnitude(T{});
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(weight[i]));
  *absmax = to_float(std::bit_cast<T>(largest));
  const float inverse = inverse_absmax(*absmax);
  std::int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) encode_at_once(weight + i, inverse, book, packed + i / 2);
  for (; i < count; i += 2) {
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
