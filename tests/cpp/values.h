// Random numbers of any dtype, and what they are exactly.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "dtype.h"

namespace qlora {

inline std::mt19937 generator(7);

// Numbers of a dtype, and what they are as doubles.
struct Values {
  DType dtype;
  std::vector<std::uint8_t> bytes;
  std::vector<double> exact;

  Values(DType type, std::int64_t n, float scale = 1.0f)
      : dtype(type), bytes(static_cast<std::size_t>(n * itemsize(type))), exact(static_cast<std::size_t>(n)) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (std::int64_t i = 0; i < n; ++i) set(i, normal(generator));
  }

  void set(std::int64_t i, float x) {
    with_type(dtype, [&](auto type) {
      const auto value = round_to<decltype(type)>(x);
      reinterpret_cast<decltype(type)*>(bytes.data())[i] = value;
      exact[static_cast<std::size_t>(i)] = to_float(value);
    });
  }

  double read(std::int64_t i) const {
    return with_type(
        dtype, [&](auto type) -> double { return to_float(reinterpret_cast<const decltype(type)*>(bytes.data())[i]); });
  }
};

}  // namespace qlora
