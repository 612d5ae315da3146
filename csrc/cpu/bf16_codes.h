// The NF4 codes of bf16 weights by integers alone: whole 16-bit lanes, where floats take two lanes each.
//
// The bits of a bf16 magnitude ascend with it, and so does its code, until the bounds: where these lie below the bits
// of absmax depends on absmax's 7 bits of mantissa only, as another exponent moves both alike. Eight octaves below
// absmax, 1024 steps, all codes are that of zero. A weight's key is its step, and for negative weights its complement:
// it ascends with the weight, and no two bounds share a bin of 32 keys.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

constexpr int kBf16Steps = 1024;
constexpr int kBf16BinBits = 5;
constexpr int kBf16Bins = 2 * kBf16Steps >> kBf16BinBits;

// The bits of an absmax for which the codes hold, with a margin: finite, no step of it is subnormal, nor the inverse.
constexpr std::uint32_t kBf16AbsmaxBegin = 10 << 7, kBf16AbsmaxEnd = 250 << 7;

// entry[mantissa of absmax][bin mod 64]: what must be added to a key for its code to stand above the lowest 5 bits.
using Bf16Codes = std::array<std::array<std::uint16_t, kBf16Bins>, 128>;

constexpr Bf16Codes make_bf16_codes(const Codebook& book) {
  Bf16Codes entry{};
  for (std::uint32_t mantissa = 0; mantissa < 128; ++mantissa) {
    const std::uint32_t absmax = 127u << 7 | mantissa;
    const float inverse = inverse_absmax(std::bit_cast<float>(absmax << 16));
    const auto code_of = [&](int key) {
      const std::uint32_t magnitude = absmax - (kBf16Steps - 1) + static_cast<std::uint32_t>(key < 0 ? ~key : key);
      return encode(book, std::bit_cast<float>((magnitude | (key < 0 ? 0x8000u : 0)) << 16) * inverse);
    };
    for (int bin = -kBf16Bins / 2; bin < kBf16Bins / 2; ++bin) {
      constexpr int kKeys = 1 << kBf16BinBits;
      const int first = bin * kKeys, code = code_of(first);
      int above = first + kKeys;  // the first key above the bin's bound
      while (above > first && code_of(above - 1) != code) --above;
      entry[mantissa][bin & (kBf16Bins - 1)] = static_cast<std::uint16_t>((code + 1) * kKeys - above);
    }
  }
  return entry;
}

inline constexpr Bf16Codes kBf16Codes = make_bf16_codes(codebook(QuantType::NF4));

}  // namespace qlora::cpu
