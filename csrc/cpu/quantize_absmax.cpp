// quantize_absmax: double quantization, the absmax of the blocks in 8 bits (QLoRA paper, section 3).
//
//   offset = mean(absmax);  nested_absmax[g] = max |absmax - offset| over group g of 256
//   code = nearest dynamic code of (absmax - offset) / nested_absmax[g]
#include <algorithm>

#include "kernels.h"
#include "path.h"

namespace qlora::cpu {

namespace {

// encode_dynamic for a multiple of 16 values, step by step: a search waits for each of its comparisons, others go on
// meanwhile.
constexpr std::int64_t kAtOnce = 16;

void encode_some(const float* absmax, std::int64_t n, float offset, float inverse, std::uint8_t* codes) {
#if defined(__x86_64__)
  if (path() >= Path::Avx512) return encode_absmax_avx512(absmax, n, offset, inverse, codes);
#endif
  for (; n > 0; n -= kAtOnce, absmax += kAtOnce, codes += kAtOnce) {
    float x[kAtOnce];
    unsigned code[kAtOnce] = {};
    for (std::int64_t i = 0; i < kAtOnce; ++i) x[i] = (absmax[i] - offset) * inverse;
    for (int bit = 7; bit >= 0; --bit) {
      const float* bound = kDynamicCodebook.bound + (1 << bit) - 1;
      for (std::int64_t i = 0; i < kAtOnce; ++i) code[i] |= static_cast<unsigned>(x[i] > bound[code[i]]) << bit;
    }
    for (std::int64_t i = 0; i < kAtOnce; ++i) codes[i] = static_cast<std::uint8_t>(code[i]);
  }
}

void encode_absmax(const float* absmax, std::int64_t n, float offset, float inverse, std::uint8_t* codes) {
  std::int64_t i = n / kAtOnce * kAtOnce;
  encode_some(absmax, i, offset, inverse, codes);
  for (; i < n; ++i) codes[i] = encode_dynamic(kDynamicCodebook.bound, (absmax[i] - offset) * inverse);
}

}  // namespace

float absmax_offset(const float* absmax, std::int64_t n) {
  if (n == 0) return 0.0f;
  double total = 0.0;
  constexpr std::int64_t kGroups = 8;  // at once: an addition waits for the one before it in its group only
  std::int64_t begin = 0;
  for (; begin + kGroups * kNestedBlocksize <= n; begin += kGroups * kNestedBlocksize) {
    double groups[kGroups] = {};
    for (std::int64_t i = begin; i < begin + kNestedBlocksize; ++i) {
      for (std::int64_t g = 0; g < kGroups; ++g) groups[g] += absmax[i + g * kNestedBlocksize];
    }
    for (const double group : groups) total += group;
  }
  for (; begin < n; begin += kNestedBlocksize) {
    double group = 0.0;
    for (std::int64_t i = begin; i < std::min<std::int64_t>(n, begin + kNestedBlocksize); ++i) group += absmax[i];
    total += group;
  }
  return static_cast<float>(total / static_cast<double>(n));
}

void quantize_absmax(const float* absmax, std::int64_t n, float offset, std::int64_t begin, std::int64_t end,
                     std::uint8_t* codes, float* nested_absmax) {
  for (std::int64_t group = begin; group < end; ++group) {
    const std::int64_t first = group * kNestedBlocksize;
    const std::int64_t last = std::min<std::int64_t>(n, first + kNestedBlocksize);
    std::uint32_t largest = 0;  // of |absmax - offset|, as bits: integers order floats of one sign, and NaN last
    for (std::int64_t i = first; i < last; ++i) {
      largest = std::max(largest, std::bit_cast<std::uint32_t>(absmax[i] - offset) & 0x7fffffffu);
    }
    nested_absmax[group] = std::bit_cast<float>(largest);
    const float inverse = inverse_group_absmax(nested_absmax[group]);
    encode_absmax(absmax + first, last - first, offset, inverse, codes + first);
  }
}

}  // namespace qlora::cpu
