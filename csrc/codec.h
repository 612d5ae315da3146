// The storage format, one value and one byte at a time (described in README, "Storage format").
//
// A block of `blocksize` consecutive elements of the flattened tensor shares one absmax. Element 2j lies in the high
// nibble of byte j, element 2j + 1 in the low nibble. Compile with -ffp-contract=off: every rounding here is part of
// the format, and the vector kernels must give the same bytes.
#pragma once

#include <cstdint>
#include <limits>

#include "codebook.h"
#include "dtype.h"
#include "integers.h"

namespace qlora {

constexpr std::int64_t kMinBlocksize = 32, kMaxBlocksize = 4096;

// A 4-bit tensor as it lies in memory. With double quantization absmax holds uint8_t codes and the nested pointers are
// set; without it absmax holds floats and they are null.
struct Packed4bit {
  const std::uint8_t* packed;  // [ceil(n / 2)]
  const void* absmax;          // [ceil(n / blocksize)]
  const float* nested_absmax;  // [ceil(num_blocks / 256)] or null
  const float* nested_offset;  // 0-d or null
  QuantType quant_type;
  std::int64_t blocksize;  // a power of two, kMinBlocksize ... kMaxBlocksize
};

// Rows and columns [begin, end) of a weight [*, K].
struct Slice {
  std::int64_t row_begin, row_end, column_begin, column_end;
};

// --- 4-bit values -------------------------------------------------------------------------------------------------

// The largest inverse, which a block of zeros has, too: the format's 1 / max(absmax, 1e-38) is computed as the smaller
// of 1 / absmax and this, as 1e-38 is subnormal, and 0 where those are flushed.
constexpr float kMaxInverse = 1.0f / 1e-38f;

// What a block's weights are multiplied by before encoding.
QLORA_HOST_DEVICE constexpr float inverse_absmax(float absmax) {
  const float inverse = 1.0f / absmax;
  return inverse > kMaxInverse ? kMaxInverse : inverse;
}

// The code of a weight already multiplied by inverse_absmax. A value beyond [-1, 1] gets the end code, as if clamped.
QLORA_HOST_DEVICE constexpr std::uint8_t encode(const Codebook& book, float x) {
  int rank = 0;
  for (int i = 0; i < kNumCodes - 1; ++i) rank += x > book.bound[i];
  return book.code_of_rank[rank];
}

QLORA_HOST_DEVICE inline std::uint8_t pack(std::uint8_t even, std::uint8_t odd) {
  return static_cast<std::uint8_t>(even << 4 | odd);
}

QLORA_HOST_DEVICE inline std::uint8_t unpack(const std::uint8_t* packed, std::int64_t element) {
  const std::uint8_t byte = packed[element / 2];
  return element % 2 == 0 ? byte >> 4 : byte & 0xf;
}

// Where the code of element i lies in a little-endian word of bytes.
QLORA_HOST_DEVICE constexpr int nibble_shift(int i) { return i % 2 == 0 ? 4 * i + 4 : 4 * i - 4; }

template <typename T>
QLORA_HOST_DEVICE T decode(const Codebook& book, std::uint8_t code, float absmax) {
  return round_to<T>(book.value[code] * absmax);
}

// The codes that round_code rounds the other way than to nearest, as bits. Rounded to nearest, NF4's codes are off in
// one direction: by 1.8e-4 of absmax a weight in bf16 for normal weights, which adds up over K wherever x has a mean.
// Two codes rounded the other way take that to 2e-5, and the root mean square from 5.3e-4 to 5.9e-4. FP4 is symmetric.
QLORA_HOST_DEVICE constexpr unsigned rounded_away(QuantType quant_type, BFloat16) {
  return quant_type == QuantType::NF4 ? 1u << 6 | 1u << 12 : 0;
}
QLORA_HOST_DEVICE constexpr unsigned rounded_away(QuantType quant_type, Half) {
  return quant_type == QuantType::NF4 ? 1u << 5 : 0;
}

// A code's value in 16 bits, for products that multiply codes and apply absmax afterwards.
template <typename T>
QLORA_HOST_DEVICE T round_code(QuantType quant_type, int code, float value) {
  const T nearest = round_to<T>(value);
  if ((rounded_away(quant_type, T{}) >> code & 1) == 0) return nearest;
  const float magnitude = value < 0.0f ? -value : value;
  const float rounded = to_float(nearest) < 0.0f ? -to_float(nearest) : to_float(nearest);
  return {static_cast<std::uint16_t>(nearest.bits + (rounded > magnitude ? -1 : 1))};
}

// --- 8-bit absmax -------------------------------------------------------------------------------------------------

// What (absmax - offset) is multiplied by before encoding; the ceiling keeps a group of zeros at 0 * FLT_MAX = 0.
QLORA_HOST_DEVICE inline float inverse_group_absmax(float group_absmax) {
  const float inverse = 1.0f / group_absmax;
  return inverse > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max() : inverse;
}

// Binary search without branches (they would be mispredicted half the time): bit by bit, is x above that bound?
// `bound` is DynamicCodebook::bound, wherever the caller keeps it.
QLORA_HOST_DEVICE inline std::uint8_t encode_dynamic(const float* bound, float x) {
  unsigned code = 0;
  for (int bit = 7; bit >= 0; --bit) code |= static_cast<unsigned>(x > bound[code + (1u << bit) - 1]) << bit;
  return static_cast<std::uint8_t>(code);
}

// `value` is DynamicCodebook::value[code]. Two roundings: nvcc would fuse the plain expression.
QLORA_HOST_DEVICE inline float decode_dynamic(float value, float nested_absmax, float nested_offset) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(value, nested_absmax), nested_offset);
#else
  return value * nested_absmax + nested_offset;
#endif
}

inline float block_absmax(const Packed4bit& w, std::int64_t block) {
  if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
  const std::uint8_t code = static_cast<const std::uint8_t*>(w.absmax)[block];
  return decode_dynamic(kDynamicCodebook.value[code], w.nested_absmax[block / kNestedBlocksize], *w.nested_offset);
}

}  // namespace qlora
