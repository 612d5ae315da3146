// The values of a codebook by bytes, lowest first: for lookups of bytes.
#pragma once

#include <cstdint>

namespace qlora::cpu {

template <int kNumValues>
struct ValueBytes {
  alignas(64) std::uint8_t byte[4][kNumValues];
};

template <int kNumValues>
constexpr ValueBytes<kNumValues> bytes_of(const float (&values)[kNumValues]) {
  ValueBytes<kNumValues> bytes{};
  for (int code = 0; code < kNumValues; ++code) {
    const auto bits = __builtin_bit_cast(std::uint32_t, values[code]);
    for (int i = 0; i < 4; ++i) bytes.byte[i][code] = static_cast<std::uint8_t>(bits >> 8 * i);
  }
  return bytes;
}

}  // namespace qlora::cpu
