// How the vector kernels encode the 8-bit states of an optimizer, and absmax, without searches: by what the dynamic
// codebooks are made of. The results are those of a search, bit for bit.
//
// The magnitudes are numbered upwards, from 0 at 0; in the unsigned codebook from 1. Each number is written as a float
// is: its exponent tells the decade, as each has twice as many values as the one below it, and its mantissa, in [1, 2),
// grows evenly with x inside the decade: (x / end + 0.8) / 0.9. So a multiplication and an addition give the mantissa
// of x, and a shift its number, in fixed point.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "../codebook.h"

namespace qlora::cpu {

// kSigned: the codebook of absmax and of the first moment, in which the code of number n is 127 + n or 127 - n; else of
// the second moment, whose code is n - 1, modulo 256.
//
// Numbers of one exponent are a line: 0 has one, seven decades, and 1. A line is told by how far a mantissa on it is
// shifted right, which is one less from line to line.
//   shift:  (kFrom - the upper 16 bits of max(|x|, kLeast)) * kLog >> 16, a logarithm that falls by 1 a decade; one
//           less if |x| is beyond the end of that line
//   y:      scale * max(|x|, kLeast) + kOffset, but at most kMost: on a decade 4 times the mantissa, as floats from 4
//           to 8 have an odd exponent, whose lowest bit stands where the leading 1 belongs
//   number: the bits of y from that one on, shifted; the lower 16 are a fraction
// Where that is less than kUnsure below 1, roundings here or in the codebook may decide, and the number is searched;
// kOffset is less by half of it, for those just above a whole number. kMost is half a cell from a line's end, or less.
template <bool kSigned>
struct Lines {
  static constexpr int kCount = kDecades + 2;
  static constexpr int kZeroShift = kSigned ? kCount - 1 : kCount - 2;  // of the line of 0
  static constexpr float kLeast = 2e-7f;
  static constexpr int kLog = 154;
  static constexpr int kFrom = (std::bit_cast<std::int32_t>(0.4f) >> 16) + ((kZeroShift - 6) << 16) / kLog + 1;
  static constexpr int kUnsure = 8;         // 2^-16
  static constexpr float kUnit = 0x1p-21f;  // 2^-16 of a number in y, on the longest line
  static constexpr float kOffset = static_cast<float>(4 * 0.8 / 0.9) - kUnsure / 2 * kUnit, kMost = 8 - 0x1p-6f;
  static constexpr std::int32_t kMantissa = 0xffffff;  // with the leading 1

  // By shift modulo 8: that of 1, of which the end is not asked, is that of 0.
  //
  // The largest bound of the line, as bits. Signed: to be compared with the bits of x, rotated left by 1, that is with
  // 2 |x|, and 1 more if x is negative, as a tie goes to the lower code: the higher number there.
  std::int32_t end[8];
  float scale[16];  // twice, for registers of 16

  constexpr Lines() : end{}, scale{} {
    constexpr int kZero = kSigned ? 127 : 0;  // the code of 0
    const DynamicCodebook& book = dynamic_codebook<kSigned>();
    for (int line = 0; line < kCount - 1; ++line) {
      const int last = kSigned ? (1 << line) - 1 : (2 << line) - 2, shift = (kZeroShift - line) % 8;
      const float bound = book.bound[kZero + last];
      const bool may_tie = kSigned && last < kZero && book.bound[kZero - 1 - last] == -bound;
      end[shift] = std::bit_cast<std::int32_t>(bound) * (kSigned ? 2 : 1) + (kSigned && !may_tie ? 1 : 0);
      if (line > 0) scale[shift] = static_cast<float>(4 / 0.9 / kDecadeEnds[line - 1]);
    }
    // Signed: 1 is in the middle of its cell, and on the line of 0 y is less than 4: its number is 0. Unsigned: the
    // shift of 1 is -1, which leaves no bits, and only 0 is on the line of 0, taken for kLeast: its number is 1.
    scale[kZeroShift % 8] = kSigned ? 4 + 0x1p-6f - kOffset : (6 - kOffset) / kLeast;
    std::copy(scale, scale + 8, scale + 8);
  }

  static constexpr int shift_of(float magnitude) {
    const int upper = std::bit_cast<std::int32_t>(std::max(magnitude, kLeast)) >> 16;
    return (kFrom - upper) * kLog >> 16;
  }
};

template <bool kSigned>
inline constexpr Lines<kSigned> kLines;

// The logarithm tells the line, or the one below; not below the first, and not the last, whose end is not asked: at the
// ends of lines, and so, as it falls steadily, between them. And kLeast is on the first decade.
template <bool kSigned>
constexpr bool logarithms_suffice() {
  using L = Lines<kSigned>;
  float begin = 0.0f;
  for (int line = 0; line < L::kCount; ++line) {
    const bool is_last = line == L::kCount - 1;
    const int shift = L::kZeroShift - line, bits = is_last ? 0 : kLines<kSigned>.end[shift % 8];
    const float end = is_last ? 1.0f + 0x1p-23f : std::bit_cast<float>(bits >> (kSigned ? 1 : 0));
    for (const float x : {begin, end}) {
      const int below = L::shift_of(x) - shift;
      if (below < (is_last ? 1 : 0) || below > (line == 0 ? 0 : 1)) return false;
    }
    begin = std::bit_cast<float>(std::bit_cast<std::int32_t>(end) + 1);
  }
  return kLines<kSigned>.scale[(L::kZeroShift - 1) % 8] * L::kLeast + L::kOffset >= 4;
}
static_assert(logarithms_suffice<true>() && logarithms_suffice<false>());

// In the logarithm's place, where two registers hold 32 numbers: the shift of the line on which floats of an exponent
// begin, and that line's end, by the exponent of max(|x|, kLeast) modulo 32.
template <bool kSigned>
struct Octaves {
  using L = Lines<kSigned>;
  static constexpr int kFirst = std::bit_cast<std::int32_t>(L::kLeast) >> 23, kLast = 127;

  alignas(64) std::int32_t shift[32], end[32];

  constexpr Octaves() : shift{}, end{} {
    int line = 0;
    for (int exponent = kFirst; exponent <= kLast; ++exponent) {
      if (exponent > kFirst && exponent << 23 > bits_of_end(line)) ++line;
      shift[exponent % 32] = L::kZeroShift - line;
      end[exponent % 32] = end_of(line);
    }
  }

  static constexpr std::int32_t end_of(int line) {
    const bool is_last = line == L::kCount - 1;
    return is_last ? std::numeric_limits<std::int32_t>::max() : kLines<kSigned>.end[(L::kZeroShift - line) % 8];
  }
  static constexpr std::int32_t bits_of_end(int line) { return end_of(line) >> (kSigned ? 1 : 0); }
};

template <bool kSigned>
inline constexpr Octaves<kSigned> kOctaves;

// Floats of an exponent that begin on a line end there or on the next.
template <bool kSigned>
constexpr bool octaves_suffice() {
  using O = Octaves<kSigned>;
  for (int exponent = O::kFirst; exponent <= O::kLast; ++exponent) {
    const int line = O::L::kZeroShift - kOctaves<kSigned>.shift[exponent % 32];
    const std::int32_t least = exponent << 23, most = least | 0x7fffff;
    if (exponent > O::kFirst && least > O::bits_of_end(line)) return false;
    if (most > O::bits_of_end(line) && most > O::bits_of_end(line + 1)) return false;
  }
  return true;
}
static_assert(octaves_suffice<true>() && octaves_suffice<false>());

}  // namespace qlora::cpu
