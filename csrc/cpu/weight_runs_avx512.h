// Runs of 32 weights in bf16, as AMX multiplies them: 16 bytes are 8 words of 4 codes, and four copies of them, each
// shifted to another code, are the indices of a lookup among the 16 weights that the block may have, rounded once as
// dequantize_4bit does (but for subnormals, which are 0 in tiles), or among the codes. So weights lie in the order in
// which shifts bring them, and what they are multiplied with must, too. A file of kernels includes this inside its
// target region, which has VBMI.
#pragma once

#include "../codec.h"

namespace qlora::cpu {
namespace {

constexpr std::int64_t kWeightRun = 32;

// The element of a run at each place: words in turn, of each the codes at bits 0, 4, 8 and 12.
inline __m512i order_of_run() {
  std::uint16_t element[kWeightRun];
  constexpr int kOfShift[] = {1, 0, 3, 2};  // the high nibble is the even element
  for (int i = 0; i < kWeightRun; ++i) element[i] = static_cast<std::uint16_t>(i % 8 * 4 + kOfShift[i / 8]);
  return _mm512_loadu_si512(element);
}

// Of each byte of the 32 indices: the bit of 8 packed bytes with which it begins. An index's upper byte does not count.
inline __m512i bits_of_run() {
  std::uint8_t bits[2 * kWeightRun];
  for (int i = 0; i < 2 * kWeightRun; ++i) bits[i] = static_cast<std::uint8_t>(i / 16 * 4 + i % 8 * 8);
  return _mm512_loadu_si512(bits);
}

// Those that a block may have, twice: of an index of 5 bits the highest does not count.
inline __m512i weights_of_block(__m512 table, float absmax) {
  const __m512 values = table * _mm512_set1_ps(absmax);
  return (__m512i)_mm512_cvtne2ps_pbh(values, values);
}

// vpsrlvw would do, too, but takes port 0, as multiplications by absmax do.
inline __m512i look_up_run(const std::uint8_t* packed, __m512i bits, __m512i weights) {
  const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(bits, words), weights);
}

}  // namespace
}  // namespace qlora::cpu
