// Integers as sizes are counted. Included before any target region, so that these are compiled for every CPU; std's
// templates would be compiled for the region's.
#pragma once

#include <cstdint>

namespace qlora {

// For a of at least 0 and b of at least 1.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

}  // namespace qlora
