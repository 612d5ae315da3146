// What the files of AdamW's CPU kernels share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../adamw.h"

namespace qlora::cpu {

// The update of one slice.
struct AdamwTask {
  const AdamwSlice* slice;
  AdamwFactors factors;  // with the scale of the gradients
  bool stochastic_rounding;
  std::uint64_t key;  // adamw_key
};

// The vector twins of the portable code: blocks [begin, end) of the slice, all of them whole.
void adamw_avx2(const AdamwTask& task, std::int64_t begin, std::int64_t end);
void adamw_avx512(const AdamwTask& task, std::int64_t begin, std::int64_t end);

// How a vector kernel finds the nearest code of x, |x| <= 1, without a search. The magnitudes of a dynamic codebook,
// ranked from 0 at 0, lie on 8 lines: 0 and the smallest decade, six more decades, and 1.
//   line   the whole part of about log10 |x|, from the bits of x; or the next line, if |x| is beyond the end of that
//   one rank   the whole part of scale * |x| + offset, and no more than the line's last
// The rank is certain, unless the sum is so close to a whole number that its rounding, or that of the codebook's
// values, may decide; that is seen in its fraction, and then the codebook's own bound is asked.
struct Lines {
  static constexpr int kCount = 8;
  static constexpr int kFractionBits = 16;
  static constexpr std::int32_t kUnsureMask = (1 << kFractionBits) - 8;  // 0: within 4 units of a whole number
  // line = (the upper 16 bits of |x|, at least kLeast) * kDecade >> 16, modulo 8
  static constexpr std::int32_t kLeast = 13619, kDecade = 154;

  std::uint32_t end[kCount];  // unsigned: as bits of a float; signed: twice that, + 1 unless -end has the higher rank
  float scale[kCount], offset[kCount];  // of the rank in units of 2^-16
  std::int32_t last[kCount];            // so that the last rank is certain
};

template <bool kSigned>
constexpr const DynamicCodebook& state_codebook() {
  if constexpr (kSigned) return kDynamicCodebook;
  return kUnsignedCodebook;
}

template <bool kSigned>
constexpr Lines make_lines() {
  const DynamicCodebook& book = state_codebook<kSigned>();
  constexpr int kZero = kSigned ? 127 : 0;
  constexpr int kRank = 1 << Lines::kFractionBits;
  constexpr int kMargin = (kRank - 1 - Lines::kUnsureMask + 1) / 2;
  Lines lines{};
  int first = 0, last = kSigned ? 1 : 2;  // ranks
  for (int line = 0; line < Lines::kCount; ++line) {
    lines.last[line] = last * kRank + kRank / 2;
    if (line == Lines::kCount - 1) {
      lines.offset[line] = static_cast<float>(lines.last[line]);
      break;
    }
    const float* value = book.value + kZero;
    const float* bound = book.bound + kZero;
    const double scale =
        (last - first) * static_cast<double>(kRank) / (static_cast<double>(value[last]) - value[first]);
    const int anchor = (first + last) / 2;  // the rank below the bound that the line goes through
    lines.scale[line] = static_cast<float>(scale);
    lines.offset[line] = static_cast<float>((anchor + 1.0) * kRank - scale * bound[anchor] + kMargin);
    lines.end[line] = std::bit_cast<std::uint32_t>(bound[last]);
    if (kSigned)
      lines.end[line] = 2 * lines.end[line] + (last < kZero && book.bound[kZero - 1 - last] == -bound[last] ? 0 : 1);
    first = last + 1;
    last = line + 2 == Lines::kCount ? first : last + (kSigned ? 2 << line : 4 << line);
  }
  return lines;
}

template <bool kSigned>
inline constexpr Lines kLines = make_lines<kSigned>();

// How a vector kernel computes the value of a code instead of looking it up: as csrc/codebook.h does. n is the rank,
// for the unsigned codebook + 1: its exponent tells the decade, and its mantissa, in [1, 2), is 1 + k / cells. Here by
// the exponent modulo 8, as it stands in the bits of a float.
struct Decades {
  static constexpr float kRange = 1.0f - 0.1f;
  float width[8];  // of a cell, as a fraction of the decade
  float half[8];   // of the decade's end, which multiplies the sum of a cell's edges
};

template <bool kSigned>
constexpr Decades make_decades() {
  Decades decades{};
  constexpr float kEnds[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  for (int decade = 0; decade < 8; ++decade) {
    const int exponent = decade + (kSigned ? 0 : 1), i = (127 + exponent) % 8;
    // The last is 1 alone, the sum of edges 0.1 and 0.9.
    decades.width[i] = decade == 7 ? 0.8f / Decades::kRange : 1.0f / static_cast<float>(1 << exponent);
    decades.half[i] = decade == 7 ? 1.0f : kEnds[decade] / 2;
  }
  return decades;
}

template <bool kSigned>
inline constexpr Decades kDecades = make_decades<kSigned>();

}  // namespace qlora::cpu
