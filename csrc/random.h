// Random numbers without a state: of a key and the index of an element, so that they depend on neither threads nor
// devices.
#pragma once

#include <cstdint>

#include "codebook.h"

namespace qlora {

// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
QLORA_HOST_DEVICE inline std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// Elements that share a key.
constexpr std::int64_t kRandomBlock = 256;

QLORA_HOST_DEVICE inline std::uint64_t random_block_key(std::uint64_t key, std::int64_t block) {
  return mix(key ^ static_cast<std::uint64_t>(block));
}

// 32 random bits for element i of a block, the upper ones the better: a 32-bit mixing function whose halves of the key
// enter apart. The vector kernels do the same.
constexpr std::uint32_t kRandomStride = 0x9e3779b9u, kRandomMix1 = 0x7feb352du, kRandomMix2 = 0x846ca68bu;
QLORA_HOST_DEVICE inline std::uint32_t random32(std::uint64_t block_key, std::uint32_t i) {
  std::uint32_t x = static_cast<std::uint32_t>(block_key) + i * kRandomStride;
  x = (x ^ x >> 16) * kRandomMix1;
  x ^= static_cast<std::uint32_t>(block_key >> 32);
  return (x ^ x >> 15) * kRandomMix2;
}

}  // namespace qlora
