// The loop of quantize_absmax around the Codes of one path. A file of kernels includes this inside its target region,
// after them.
#include "dynamic_codes_loops.h"

namespace qlora::cpu {
namespace {

// Groups [begin, end) of absmax, whole ones.
template <typename Codes>
void quantize_groups(const float* absmax, float offset, std::int64_t begin, std::int64_t end, std::uint8_t* codes,
                     float* nested_absmax) {
  const Codes encoder;
  for (std::int64_t group = begin; group < end; ++group) {
    const std::int64_t first = group * kNestedBlocksize;
    alignas(64) float differences[kNestedBlocksize];
    std::uint32_t largest = 0;  // of |difference|, as bits: integers order floats of one sign, and NaN last
    for (int i = 0; i < kNestedBlocksize; ++i) {
      differences[i] = absmax[first + i] - offset;
      const std::uint32_t magnitude = __builtin_bit_cast(std::uint32_t, differences[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const Scale scale(largest);
    nested_absmax[group] = scale.absmax;
    encode_block(encoder, differences, kNestedBlocksize, scale, codes + first);
  }
}

}  // namespace
}  // namespace qlora::cpu
