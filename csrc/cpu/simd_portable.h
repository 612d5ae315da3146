// What the portable kernels share, in what GCC and Clang make of plain C++ for any machine: vectors as a class, of four
// lanes, the least that one has, and the lookup of codes.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace qlora::cpu {

struct PortableVectors {
  using Vector = float __attribute__((vector_size(16)));
  using Bits = std::uint32_t __attribute__((vector_size(16)));
  using Words = std::uint16_t __attribute__((vector_size(8)));
  static constexpr std::int64_t kLanes = 4;

  static Bits bits(Vector x) { return reinterpret_cast<Bits>(x); }
  static Vector floats(Bits x) { return reinterpret_cast<Vector>(x); }

  static Vector splat(float x) { return Vector{x, x, x, x}; }

  // a * b + c, fused where that is an instruction.
  static Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
    for (std::int64_t i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
  }

  template <typename T>
  static Vector load(const T* from) {
    return Vector{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
  }

  // As to_float and round_to of dtype.h. Comparisons are of floats: SSE2 has none of unsigned integers.
  static Vector load(const Half* from) {
    const Bits half{from[0].bits, from[1].bits, from[2].bits, from[3].bits}, magnitude = (half & 0x7fff) << 13;
    const Vector normal = floats(magnitude + 0x38000000);
    const Vector subnormal = floats(magnitude + 0x38800000) - 0x1p-14f;
    const Vector finite = normal < 0x1p-14f ? subnormal : normal;
    return floats(bits(normal < 0x1p16f ? finite : floats(magnitude + 0x70000000)) | (half & 0x8000) << 16);
  }

  template <typename T>
  static Vector load(const T* from, std::int64_t count) {
    Vector x{};
    for (std::int64_t i = 0; i < count; ++i) x[i] = to_float(from[i]);
    return x;
  }

  template <typename T>
  static void store(T* to, Vector x) {
    for (std::int64_t i = 0; i < kLanes; ++i) to[i] = round_to<T>(x[i]);
  }

  static void store(BFloat16* to, Vector x) {
    const Bits rounded = (bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16;
    store(&to->bits, x == x ? rounded : Bits{} + 0x7fc0);
  }

  static void store(Half* to, Vector x) {
    const Bits magnitude = bits(x) & 0x7fffffff;
    const Bits normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const Bits subnormal = bits(floats(magnitude) + 0.5f) - 0x3f000000;
    Bits half = floats(magnitude) < 0x1p-14f ? subnormal : normal;
    half = floats(magnitude) < 65520.0f ? half : Bits{} + 0x7c00;
    half = x == x ? half : Bits{} + 0x7e00;
    store(&to->bits, half | (bits(x) >> 16 & 0x8000));
  }

  static void store(std::uint16_t* to, Bits x) {
    const Words words = __builtin_convertvector(x, Words);
    __builtin_memcpy(to, &words, sizeof words);
  }

  static void transpose(Vector (&x)[kLanes]) {
    const Vector from[kLanes] = {x[0], x[1], x[2], x[3]};
    for (std::int64_t i = 0; i < kLanes; ++i) x[i] = Vector{from[0][i], from[1][i], from[2][i], from[3][i]};
  }
};

// The values of a byte's two codes, in the order of its elements.
struct CodePairs {
  alignas(8) float value[256][2];

  constexpr explicit CodePairs(QuantType quant_type) : value{} {
    for (int byte = 0; byte < 256; ++byte) {
      value[byte][0] = codebook(quant_type).value[byte >> 4];
      value[byte][1] = codebook(quant_type).value[byte & 0xf];
    }
  }

  // Of two bytes: two loads.
  PortableVectors::Vector operator()(std::uint8_t first, std::uint8_t second) const {
    using Halves = double __attribute__((vector_size(16)));
    double half[2];
    __builtin_memcpy(&half[0], value[first], sizeof half[0]);
    __builtin_memcpy(&half[1], value[second], sizeof half[1]);
    return reinterpret_cast<PortableVectors::Vector>(Halves{half[0], half[1]});
  }
};

inline constexpr CodePairs kCodePairs[] = {CodePairs(QuantType::NF4), CodePairs(QuantType::FP4)};

constexpr const CodePairs& code_pairs(QuantType quant_type) { return kCodePairs[static_cast<int>(quant_type)]; }

}  // namespace qlora::cpu
