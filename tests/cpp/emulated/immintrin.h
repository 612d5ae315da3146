// Stands in front of the compiler's <immintrin.h> when the vector kernels are built for any x86-64
// (cmake/emulated.cmake): intrinsics beyond SSE2 are SIMDe's, by their own names, and what SIMDe 0.8.2 lacks or rounds
// otherwise is defined here.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace emulated {

template <typename Lane, typename Register>
inline auto lanes(Register x) {
  return std::bit_cast<std::array<Lane, sizeof x / sizeof(Lane)>>(x);
}

// Each lane cast; lanes of the result that have none to come from are 0. `result` gives the type alone, here and below.
template <typename From, typename To, typename Source, typename Register>
inline Register convert(Source source, Register result) {
  const auto from = lanes<From>(source);
  auto to = lanes<To>(result);
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = i < from.size() ? static_cast<To>(from[i]) : To{};
  return std::bit_cast<Register>(to);
}

template <typename Register>
inline Register fused(Register a, Register b, Register c, float sign_a, float sign_c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  auto out = x;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = std::fma(sign_a * x[i], y[i], sign_c * z[i]);
  return std::bit_cast<Register>(out);
}

// To the next float below, not the nearest: doubles hold the product, and the sum with its error.
inline float fused_down(float a, float b, float c) {
  const float nearest = std::fma(a, b, c);
  const double product = double{a} * b, sum = product + c, part = sum - product;
  const double error = (product - (sum - part)) + (c - part);
  const bool above = nearest > sum || (nearest == sum && error < 0);
  return above ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}

// A sum as the compiler's reduce_add does it: the upper half onto the lower, until one lane is left.
template <typename Lane, typename Register>
inline Lane reduce_add(Register x) {
  auto lane = lanes<Lane>(x);
  for (std::size_t half = lane.size() / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
  }
  return lane[0];
}

template <typename Lane, typename Register>
inline void store(void* to, std::uint64_t k, Register x) {
  const auto from = lanes<Lane>(x);
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (k >> i & 1) __builtin_memcpy(static_cast<Lane*>(to) + i, &from[i], sizeof(Lane));
  }
}

inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

inline float widen(std::uint16_t bf16) { return flush(std::bit_cast<float>(static_cast<std::uint32_t>(bf16) << 16)); }

// vdpbf16ps: two fused multiply-adds a lane, the odd element first; subnormals are 0 on the way in and out.
template <typename Register, typename Pairs>
inline Register dpbf16(Register sum, Pairs a, Pairs b) {
  const auto x = lanes<std::uint16_t>(a), y = lanes<std::uint16_t>(b);
  auto out = lanes<float>(sum);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const float odd = flush(std::fma(widen(x[2 * i + 1]), widen(y[2 * i + 1]), flush(out[i])));
    out[i] = flush(std::fma(widen(x[2 * i]), widen(y[2 * i]), odd));
  }
  return std::bit_cast<Register>(out);
}

// vcvtneps2bf16: to nearest even, subnormals to 0, a NaN's upper half made quiet.
inline std::uint16_t narrow(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(flush(x));
  if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// The lanes of `low`, then those of `high`.
template <typename Source, typename Register, typename... High>
inline Register narrow_all(Register result, Source low, High... high) {
  auto to = lanes<std::uint16_t>(result);
  std::size_t i = 0;
  for (const Source& source : {low, high...}) {
    for (float x : lanes<float>(source)) to[i++] = narrow(x);
  }
  return std::bit_cast<Register>(to);
}

// vfpclassps, as far as it is asked for.
inline std::uint16_t classify(__m512 a, int classes) {
  std::uint16_t mask = 0;
  for (std::size_t i = 0; i < 16; ++i) {
    const float x = lanes<float>(a)[i];
    const bool quiet = std::bit_cast<std::uint32_t>(x) >> 22 & 1;
    const int of_x = x != x ? (quiet ? 0x01 : 0x80) : std::fpclassify(x) == FP_SUBNORMAL ? 0x20 : 0;
    mask |= static_cast<std::uint16_t>(((of_x & classes) != 0) << i);
  }
  return mask;
}

}  // namespace emulated

// --- What SIMDe lacks ---------------------------------------------------------------------------------------------
// A later SIMDe may define it: as a macro, which must not rewrite the definition.
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi64_epi8
#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu8_epi64
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#undef _mm512_cvtps_ph
#undef _mm512_cvtss_f32
#undef _mm512_fpclass_ps_mask
#undef _mm512_maskz_loadu_epi8
#undef _mm512_reduce_add_ps
#undef _mm512_stream_si512

inline __m128i _mm512_cvtepi32_epi8(__m512i a) { return emulated::convert<std::uint32_t, std::uint8_t>(a, __m128i{}); }
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return emulated::convert<std::uint32_t, std::uint16_t>(a, __m256i{});
}
inline __m128i _mm512_cvtepi64_epi8(__m512i a) { return emulated::convert<std::uint64_t, std::uint8_t>(a, __m128i{}); }
inline __m512i _mm512_cvtepu8_epi16(__m256i a) { return emulated::convert<std::uint8_t, std::uint16_t>(a, __m512i{}); }
inline __m512i _mm512_cvtepu8_epi32(__m128i a) { return emulated::convert<std::uint8_t, std::uint32_t>(a, __m512i{}); }
inline __m512i _mm512_cvtepu8_epi64(__m128i a) { return emulated::convert<std::uint8_t, std::uint64_t>(a, __m512i{}); }
inline __m256bh _mm512_cvtneps_pbh(__m512 a) { return emulated::narrow_all(__m256bh{}, a); }
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) { return emulated::narrow_all(__m512bh{}, low, high); }
inline __m512i _mm512_maskz_loadu_epi8(std::uint64_t k, const void* from) {  // reads what it keeps, no more
  std::array<std::uint8_t, 64> bytes{};
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = k >> i & 1 ? static_cast<const std::uint8_t*>(from)[i] : 0;
  return std::bit_cast<__m512i>(bytes);
}
inline std::uint16_t _mm512_fpclass_ps_mask(__m512 a, int classes) { return emulated::classify(a, classes); }
inline float _mm512_cvtss_f32(__m512 a) { return emulated::lanes<float>(a)[0]; }
inline float _mm512_reduce_add_ps(__m512 a) { return emulated::reduce_add<float>(a); }

// To nearest even, whatever the second argument: the kernels know no other rounding.
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  const __m128i low = _mm256_cvtps_ph(_mm512_castps512_ps256(a), 0);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm256_cvtps_ph(_mm512_extractf32x8_ps(a, 1), 0), 1);
}

inline void _mm512_stream_si512(void* to, __m512i x) { _mm512_store_si512(to, x); }

// --- What SIMDe rounds otherwise: a multiply-add twice; in vdpbf16ps it adds the two products first, flushes nothing -
// (Forms of the multiply-add that no kernel takes are left as they are: one that comes into use belongs here.)
#undef _mm_fmadd_ps
#undef _mm256_fmadd_ps
#undef _mm256_fnmadd_ps
#undef _mm512_fmadd_ps
#undef _mm512_fmadd_round_ps
#undef _mm512_fmsub_ps
#undef _mm512_fnmadd_ps
#undef _mm512_mask_fmadd_ps
#undef _mm512_mask3_fmadd_ps
#undef _mm512_maskz_fmadd_ps
#undef _mm256_dpbf16_ps
#undef _mm512_dpbf16_ps

inline __m128 _mm_fmadd_ps(__m128 a, __m128 b, __m128 c) { return emulated::fused(a, b, c, 1, 1); }
inline __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c) { return emulated::fused(a, b, c, 1, 1); }
inline __m256 _mm256_fnmadd_ps(__m256 a, __m256 b, __m256 c) { return emulated::fused(a, b, c, -1, 1); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return emulated::fused(a, b, c, 1, 1); }
inline __m512 _mm512_fmadd_round_ps(__m512 a, __m512 b, __m512 c, int) {  // down: the kernels know no other rounding
  const auto x = emulated::lanes<float>(a), y = emulated::lanes<float>(b), z = emulated::lanes<float>(c);
  auto out = x;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = emulated::fused_down(x[i], y[i], z[i]);
  return std::bit_cast<__m512>(out);
}
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return emulated::fused(a, b, c, 1, -1); }
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return emulated::fused(a, b, c, -1, 1); }
inline __m512 _mm512_mask_fmadd_ps(__m512 a, __mmask16 k, __m512 b, __m512 c) {
  return _mm512_mask_mov_ps(a, k, _mm512_fmadd_ps(a, b, c));
}
inline __m512 _mm512_mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 k) {
  return _mm512_mask_mov_ps(c, k, _mm512_fmadd_ps(a, b, c));
}
inline __m512 _mm512_maskz_fmadd_ps(__mmask16 k, __m512 a, __m512 b, __m512 c) {
  return _mm512_maskz_mov_ps(k, _mm512_fmadd_ps(a, b, c));
}
inline __m256 _mm256_dpbf16_ps(__m256 sum, __m256bh a, __m256bh b) { return emulated::dpbf16(sum, a, b); }
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) { return emulated::dpbf16(sum, a, b); }

// --- What SIMDe gets by a shift by 64, undefined, where a byte begins at bit 0 --------------------------------------
#undef _mm512_multishift_epi64_epi8

inline __m512i _mm512_multishift_epi64_epi8(__m512i bits, __m512i x) {
  auto bytes = emulated::lanes<std::uint8_t>(bits);
  const auto words = emulated::lanes<std::uint64_t>(x);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::uint8_t>(std::rotr(words[i / 8], bytes[i] % 64));
  }
  return std::bit_cast<__m512i>(bytes);
}

// --- What SIMDe stores otherwise: zeros where the mask has none, and the CPU nothing ---------------------------------
#undef _mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi16

inline void _mm512_mask_storeu_ps(void* to, __mmask16 k, __m512 a) { emulated::store<float>(to, k, a); }
inline void _mm256_mask_storeu_epi16(void* to, __mmask16 k, __m256i a) { emulated::store<std::uint16_t>(to, k, a); }
