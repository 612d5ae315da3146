// quantize_absmax: double quantization, the absmax of the blocks in 8 bits (QLoRA paper, section 3).
//
//   offset = mean(absmax);  nested_absmax[g] = max |absmax - offset| over group g of 256
//   code = nearest dynamic code of (absmax - offset) / nested_absmax[g]
#include <algorithm>
#include <cstring>

#include "path.h"
#include "quantize.h"

namespace qlora::cpu {

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
  auto kernel = quantize_absmax_portable;
#if defined(__x86_64__)
  const Path chosen = path();
  if (chosen >= Path::Avx2) kernel = chosen == Path::Avx2 ? quantize_absmax_avx2 : quantize_absmax_avx512;
#endif
  const std::int64_t whole = std::max(begin, std::min(end, n / kNestedBlocksize));
  kernel(absmax, offset, begin, whole, codes, nested_absmax);
  if (whole < end) {  // the last, shorter group: filled up with a number of its own, which changes no code
    const std::int64_t first = whole * kNestedBlocksize;
    float last[kNestedBlocksize];
    std::uint8_t of_last[kNestedBlocksize];
    for (std::int64_t i = 0; i < kNestedBlocksize; ++i) last[i] = absmax[std::min(first + i, n - 1)];
    kernel(last, offset, 0, 1, of_last, nested_absmax + whole);
    std::memcpy(codes + first, of_last, static_cast<std::size_t>(n - first));
  }
}

}  // namespace qlora::cpu
