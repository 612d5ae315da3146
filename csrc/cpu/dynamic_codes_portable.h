// The 8-bit codes of the dynamic codebooks for any machine: by lookup, and by search.
#pragma once

#include "../codebook.h"
#include "simd_portable.h"

namespace qlora::cpu {
namespace {

template <bool kSigned>
struct DynamicCodes {
  static constexpr std::int64_t kDecoded = 1, kEncoded = 16;

  static constexpr const DynamicCodebook& book() { return dynamic_codebook<kSigned>(); }

  static void decode(const std::uint8_t* codes, PortableVectors::Vector* out) {
    *out = PortableVectors::Vector{book().value[codes[0]], book().value[codes[1]], book().value[codes[2]],
                                   book().value[codes[3]]};
  }

  struct Placed {};
  static Placed place(const float*, float) { return {}; }

  // encode_dynamic step by step: a search waits for each of its comparisons, others go on meanwhile.
  static void encode(Placed, const float* values, float inverse, std::uint8_t* codes) {
    float x[kEncoded];
    unsigned code[kEncoded] = {};
    for (std::int64_t i = 0; i < kEncoded; ++i) x[i] = values[i] * inverse;
    for (int bit = 7; bit >= 0; --bit) {
      const float* bound = book().bound + (1 << bit) - 1;
      for (std::int64_t i = 0; i < kEncoded; ++i) code[i] |= static_cast<unsigned>(x[i] > bound[code[i]]) << bit;
    }
    for (std::int64_t i = 0; i < kEncoded; ++i) codes[i] = static_cast<std::uint8_t>(code[i]);
  }
};

}  // namespace
}  // namespace qlora::cpu
