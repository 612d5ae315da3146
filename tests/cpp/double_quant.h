// Double quantization by the kernels: what they make of absmax.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/quantize.h"

namespace qlora {

struct DoubleQuantized {
  std::vector<std::uint8_t> codes;
  std::vector<float> nested_absmax;
  float offset;

  // step: groups of a call.
  explicit DoubleQuantized(const std::vector<float>& absmax, std::int64_t step = 1 << 20) : codes(absmax.size()) {
    const auto n = static_cast<std::int64_t>(absmax.size());
    const std::int64_t groups = (n + kNestedBlocksize - 1) / kNestedBlocksize;
    nested_absmax.resize(static_cast<std::size_t>(groups));
    std::vector<double> sums(nested_absmax.size());
    for (std::int64_t begin = 0; begin < groups; begin += step) {
      cpu::sum_absmax(absmax.data(), n, begin, std::min(groups, begin + step), sums.data());
    }
    offset = cpu::absmax_offset(sums.data(), groups, n);
    for (std::int64_t begin = 0; begin < groups; begin += step) {
      cpu::quantize_absmax(absmax.data(), n, offset, begin, std::min(groups, begin + step), codes.data(),
                           nested_absmax.data());
    }
  }
};

}  // namespace qlora
