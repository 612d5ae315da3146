// quantize_absmax: double quantization, the absmax of the blocks in 8 bits (QLoRA paper, section 3).
//
//   offset = mean(absmax);  nested_absmax[g] = max |absmax - offset| over group g of 256
//   code = nearest dynamic code of (absmax - offset) / nested_absmax[g]
#include <algorithm>

#include "path.h"
#include "quantize.h"

namespace qlora::cpu {

namespace {

// encode_dynamic for 16 values, step by step: a search waits for each of its comparisons, others go on meanwhile.
constexpr std::int64_t kAtOnce = 16;

void encode_at_once(const float* absmax, float offset, float inverse, std::uint8_t* codes) {
  float x[kAtOnce];
  unsigned code[kAtOnce] = {};
  for (std::int64_t i = 0; i < kAtOnce; ++i) x[i] = (absmax[i] - offset) * inverse;
  for (int bit = 7; bit >= 0; --bit) {
    const float* bound = kDynamicCodebook.bound + (1 << bit) - 1;
    for (std::int64_t i = 0; i < kAtOnce; ++i) code[i] |= static_cast<unsigned>(x[i] > bound[code[i]]) << bit;
  }
  for (std::int64_t i = 0; i < kAtOnce; ++i) codes[i] = static_cast<std::uint8_t>(code[i]);
}

void encode_absmax(const float* absmax, std::int64_t n, float offset, float inverse, std::uint8_t* codes) {
  std::int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) encode_at_once(absmax + i, offset, inverse, codes + i);
  for (; i < n; ++i) codes[i] = encode_dynamic(kDynamicCodebook.bound, (absmax[i] - offset) * inverse);
}

}  // namespace

void sum_absmax(const float* absmax, std::int64_t n, std::int64_t begin, std::int64_t end, double* sums) {
  constexpr std::int64_t kGroups = 8;  // at once: an addition waits for the one before it in its group only
  std::int64_t group = begin;
  for (; group + kGroups <= end && (group + kGroups) * kNestedBlocksize <= n; group += kGroups) {
    double groups[kGroups] = {};
    const float* first = absmax + group * kNestedBlocksize;
    for (std::int64_t i = 0; i < kNestedBlocksize; ++i) {
      for (std::int64_t g = 0; g < kGroups; ++g) groups[g] += first[i + g * kNestedBlocksize];
    }
    for (std::int64_t g = 0; g < kGroups; ++g) sums[group + g] = groups[g];
  }
  for (; group < end; ++group) {
    double sum = 0.0;
    const std::int64_t first = group * kNestedBlocksize;
    for (std::int64_t i = first; i < std::min<std::int64_t>(n, first + kNestedBlocksize); ++i) sum += absmax[i];
    sums[group] = sum;
  }
}

float absmax_offset(const double* sums, std::int64_t groups, std::int64_t n) {
  double total = 0.0;
  for (std::int64_t group = 0; group < groups; ++group) total += sums[group];
  return n == 0 ? 0.0f : static_cast<float>(total / static_cast<double>(n));
}

void quantize_absmax(const float* absmax, std::int64_t n, float offset, std::int64_t begin, std::int64_t end,
                     std::uint8_t* codes, float* nested_absmax) {
#if defined(__x86_64__)
  if (const Path chosen = path(); chosen != Path::Portable) {
    const std::int64_t whole = std::max(begin, std::min(end, n / kNestedBlocksize));
    const auto vector_kernel = chosen == Path::Avx2 ? quantize_absmax_avx2 : quantize_absmax_avx512;
    vector_kernel(absmax, offset, begin, whole, codes, nested_absmax);
    begin = whole;
  }
#endif
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
