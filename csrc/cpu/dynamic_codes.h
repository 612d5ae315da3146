// How the vector kernels encode the 8-bit states of an optimizer, and absmax, without searches, and AVX2 decodes states
// without lookups (AVX512: dynamic_lookup_avx512*.h): by what the dynamic codebooks are made of. The results are those
// of the codebooks, bit for bit.
//
// The rank of a magnitude is its number among the ascending ones of its codebook, from 0 at 0.
#pragma once

#include <bit>
#include <cstdint>

#include "../codebook.h"

namespace qlora::cpu {

// kSigned: of the first moment, in which the code of rank r is 127 + r or 127 - r; else of the second, whose code is r.
template <bool kSigned>
constexpr const DynamicCodebook& state_codebook() {
  if constexpr (kSigned) return kDynamicCodebook;
  return kUnsignedCodebook;
}

// --- encoding -----------------------------------------------------------------------------------------------------

// The magnitudes lie on 8 lines: the smallest decade, if signed with 0, six more decades, and 1.
//   line: about the whole part of log10 |x|, namely (the upper 16 bits of |x|, at least kLeast) * kLog >> 16, modulo
//         8 or 16; or the next one, if |x| is beyond the end of that
//   rank: the whole part of scale * |x| + offset, but not beyond the last of the line
// The sum is in fixed point. So close to a whole number that its rounding or the codebook's own may decide, the rank is
// unsure, and has to be searched.
struct Lines {
  static constexpr int kCount = kDecades + 1;
  static constexpr std::int32_t kLeast = 13619, kLog = 154;
  static_assert((kLeast * kLog >> 16) % 16 == 0);
  static constexpr int kFractionBits = 16;
  static constexpr int kUnsure = 2;                                              // units; the sum has as many added
  static constexpr std::int32_t kSureMask = (1 << kFractionBits) - 2 * kUnsure;  // of the fraction; 0: unsure

  // The largest bound of the line, as bits. Signed: they are compared with the bits of x, rotated left by 1, that is
  // with 2 |x|, and 1 more if x is negative, as a tie goes to the lower code: the higher rank there.
  std::int32_t end[kCount];
  float scale[kCount], offset[kCount];
  std::int32_t last[kCount];  // as a sum that is sure
};

template <bool kSigned>
constexpr Lines make_lines() {
  constexpr int kZero = kSigned ? 127 : 0;  // the code of 0
  constexpr int kUnit = 1 << Lines::kFractionBits;
  const DynamicCodebook& book = state_codebook<kSigned>();
  const float *value = book.value + kZero, *bound = book.bound + kZero;  // by rank
  Lines lines{};
  for (int line = 0, first = kSigned ? 0 : 1; line < kDecades; ++line) {
    const int last = (kSigned ? 2 << line : 4 << line) - (kSigned ? 1 : 2);
    const int middle = (first + last) / 2;
    // There is one bound on the first line, with 0 half a rank below it.
    const double scale = line == 0 ? kUnit / (2 * double{bound[last - 1]})
                                   : (last - first) * double{kUnit} / (double{value[last]} - double{value[first]});
    lines.scale[line] = static_cast<float>(scale);
    lines.offset[line] = static_cast<float>((middle + 1) * double{kUnit} - scale * bound[middle] + Lines::kUnsure);
    lines.last[line] = last * kUnit + kUnit / 2;
    lines.end[line] = std::bit_cast<std::int32_t>(bound[last]);
    if (kSigned) {
      const bool may_tie = last < kZero && book.bound[kZero - 1 - last] == -bound[last];
      lines.end[line] = 2 * lines.end[line] + (may_tie ? 0 : 1);
    }
    first = last + 1;
  }
  lines.last[kDecades] = (kNumDynamicCodes - 1 - kZero) * kUnit + kUnit / 2;
  lines.offset[kDecades] = static_cast<float>(lines.last[kDecades]);
  return lines;
}

template <bool kSigned>
inline constexpr Lines kLines = make_lines<kSigned>();

// --- decoding -----------------------------------------------------------------------------------------------------

// A value is the sum of the edges of its cell, times half the end of its decade. n, the rank or in the unsigned
// codebook the rank + 1, tells both: decade by the exponent, here modulo 8 as it stands in the bits of a float; and the
// mantissa, in [1, 2), is 1 + place / cells. 0 is a case of its own, and 1 a decade of one cell, with edges of 0.1 and
// 0.9.
struct Cells {
  float width[8];  // as a fraction of the decade
  float half[8];   // of the decade's end
};

template <bool kSigned>
constexpr Cells make_cells() {
  Cells cells{};
  for (int decade = 0; decade <= kDecades; ++decade) {
    const int exponent = decade + (kSigned ? 0 : 1), i = (127 + exponent) % 8;
    cells.width[i] = decade == kDecades ? 0.8f / kDecadeRange : 1.0f / static_cast<float>(1 << exponent);
    cells.half[i] = decade == kDecades ? 1.0f : kDecadeEnds[decade] / 2;
  }
  return cells;
}

template <bool kSigned>
inline constexpr Cells kCells = make_cells<kSigned>();

}  // namespace qlora::cpu
