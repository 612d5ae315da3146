// The NF4 codes of bf16 weights by integers alone: whole 16-bit lanes, where floats take two lanes each.
//
// The bits of a bf16 magnitude ascend with it, and so does its code, until the bounds: where these lie below the bits
// of absmax depends on absmax's 7 bits of mantissa only, as another exponent moves both alike. Eight octaves below
// absmax, 1024 steps, all codes are that of zero. A weight's key ascends with it: its step, and for negative weights
// the step's complement (AVX512), in whose bins of 32 keys there is no more than one bound; or its negative (AVX2,
// which has an instruction for that), for a search among the keys of the bounds.
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

// The codes of a block whose absmax has this mantissa.
struct Bf16Encoder {
  const Codebook& book;
  std::uint32_t absmax;
  float inverse;

  constexpr Bf16Encoder(const Codebook& book, std::uint32_t mantissa)
      : book(book), absmax(127u << 7 | mantissa), inverse(inverse_absmax(std::bit_cast<float>(absmax << 16))) {}

  constexpr int operator()(int step, bool negative) const {
    const std::uint32_t magnitude = absmax - (kBf16Steps - 1) + static_cast<std::uint32_t>(step);
    return encode(book, std::bit_cast<float>((magnitude | (negative ? 0x8000u : 0)) << 16) * inverse);
  }
};

constexpr Bf16Codes make_bf16_codes(const Codebook& book) {
  Bf16Codes entry{};
  for (std::uint32_t mantissa = 0; mantissa < 128; ++mantissa) {
    const Bf16Encoder encoder(book, mantissa);
    const auto code_of = [&](int key) { return encoder(key < 0 ? ~key : key, key < 0); };
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

// The largest key below each bound, as a search of four comparisons meets them: the middle one, then one of the
// quarters, eighths and sixteenths, by a vector lookup of words. The bits of the code that are known by then (8; 8 and
// 4; 8, 4 and 2) are the place of the next bound in bytes: so quarters use each fourth word, eighths each second.
struct alignas(16) Bf16Bounds {
  std::int16_t sixteenths[8], eighths[8], quarters[8], middle;
};

constexpr std::array<Bf16Bounds, 128> make_bf16_bounds(const Codebook& book) {
  std::array<Bf16Bounds, 128> bounds{};
  for (std::uint32_t mantissa = 0; mantissa < 128; ++mantissa) {
    const Bf16Encoder encoder(book, mantissa);
    const auto code_of = [&](int key) { return encoder(key < 0 ? -key : key, key < 0); };
    const auto below = [&](int bound) {  // a code is the number of bounds below
      int key = 1 - kBf16Steps, above = kBf16Steps - 1;
      while (above - key > 1) (code_of((key + above) / 2) > bound ? above : key) = (key + above) / 2;
      return static_cast<std::int16_t>(key);
    };
    Bf16Bounds& of = bounds[mantissa];
    of.middle = below(7);
    for (int i = 0; i < 8; i += 4) of.quarters[i] = below(2 * i + 3);
    for (int i = 0; i < 8; i += 2) of.eighths[i] = below(2 * i + 1);
    for (int i = 0; i < 8; ++i) of.sixteenths[i] = below(2 * i);
  }
  return bounds;
}

inline constexpr std::array<Bf16Bounds, 128> kBf16Bounds = make_bf16_bounds(codebook(QuantType::NF4));

}  // namespace qlora::cpu
