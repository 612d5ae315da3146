// The three floating-point types of weights and activations, and their exact conversion to and from fp32.
// bf16 and fp16 are carried as their uint16_t bits, so that no compiler or machine support is needed.
#pragma once

#include <bit>
#include <cstdint>

#include "codebook.h"

namespace qlora {

enum class DType : int { Float32 = 0, Float16 = 1, BFloat16 = 2 };

constexpr std::int64_t itemsize(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

QLORA_HOST_DEVICE inline float to_float(float x) { return x; }

QLORA_HOST_DEVICE inline float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

QLORA_HOST_DEVICE inline float to_float(Half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // Inf, NaN
  // Exponent and mantissa in fp32's fields, biased anew; a subnormal one by a difference of normal numbers, as others
  // may be flushed.
  const float value = magnitude < 0x400u ? std::bit_cast<float>(0x38800000u + (magnitude << 13)) - 0x1p-14f
                                         : std::bit_cast<float>(0x38000000u + (magnitude << 13));
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

// Round to nearest, ties to even. A NaN becomes 0x7fc0 in bf16, a quiet one of its sign in fp16, where vector kernels
// keep its payload, too.
template <typename T>
QLORA_HOST_DEVICE T round_to(float x);

template <>
QLORA_HOST_DEVICE inline float round_to<float>(float x) {
  return x;
}

template <>
QLORA_HOST_DEVICE inline BFloat16 round_to<BFloat16>(float x) {
  if (x != x) return {0x7fc0};
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
QLORA_HOST_DEVICE inline Half round_to<Half>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to Inf
  } else if (magnitude < 0x38800000u) {
    // Below the smallest normal (2^-14): adding 0.5 makes the fp32 adder round at 2^-24, fp16's subnormal step.
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

// Calls body with a value of the C++ type that stands for dtype.
template <typename Body>
decltype(auto) with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::Float16:
      return body(Half{});
    case DType::BFloat16:
      return body(BFloat16{});
    case DType::Float32:
      break;
  }
  return body(float{});
}

}  // namespace qlora
