// dequantize_4bit for AVX2: whole blocks. fp32 looks up each half of the block's table and blends by bit 3 of the code;
// the 16-bit types look up the low and the high bytes of the table by vpshufb and interleave them.
#include "dequantize_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

template <bool kPastCaches>
inline void store(__m128i* to, __m128i x) {
  kPastCaches ? _mm_stream_si128(to, x) : _mm_storeu_si128(to, x);
}

template <bool kPastCaches>
inline void store(float* to, __m256 x) {
  kPastCaches ? _mm256_stream_ps(to, x) : _mm256_storeu_ps(to, x);
}

template <bool kPastCaches, typename T>  // bf16 or fp16
inline void dequantize_block(const std::uint8_t* packed, std::int64_t blocksize, __m256 low, __m256 high, T* out) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(round_dwords(low, T{}), round_dwords(high, T{})),
                                                 0b11011000);  // 16 words in code order
  const __m256i byte_mask = _mm256_set1_epi16(0xff);
  const __m256i low_bytes = _mm256_and_si256(words, byte_mask);
  const __m256i high_bytes = _mm256_srli_epi16(words, 8);
  const __m256i planes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low_bytes, high_bytes), 0b11011000);
  const __m128i low_plane = _mm256_castsi256_si128(planes);
  const __m128i high_plane = _mm256_extracti128_si256(planes, 1);
  const __m128i nibble = _mm_set1_epi8(0xf);
  for (std::int64_t i = 0; i < blocksize; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
    const __m128i odd = _mm_and_si128(bytes, nibble);
    const __m128i codes[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
    for (int j = 0; j < 2; ++j) {
      const __m128i lo = _mm_shuffle_epi8(low_plane, codes[j]);
      const __m128i hi = _mm_shuffle_epi8(high_plane, codes[j]);
      auto* to = reinterpret_cast<__m128i*>(out + i + 16 * j);
      store<kPastCaches>(to, _mm_unpacklo_epi8(lo, hi));
      store<kPastCaches>(to + 1, _mm_unpackhi_epi8(lo, hi));
    }
  }
}

template <bool kPastCaches>
inline void dequantize_block(const std::uint8_t* packed, std::int64_t blocksize, __m256 low, __m256 high, float* out) {
  for (std::int64_t i = 0; i < blocksize; i += 8) {
    const __m128i bytes = _mm_loadu_si32(packed + i / 2);
    const __m256i qword = _mm256_cvtepu8_epi64(bytes);
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(qword, 4), _mm256_slli_epi64(qword, 32));
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    store<kPastCaches>(
        out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), bit3));
  }
}

template <bool kPastCaches, typename T>
void dequantize_blocks(const Packed4bit& w, std::int64_t begin, std::int64_t end, T* out) {
  const float* values = codebook(w.quant_type).value;
  const __m256 low_values = _mm256_loadu_ps(values);
  const __m256 high_values = _mm256_loadu_ps(values + 8);
  for (std::int64_t block = begin; block < end; ++block, out += w.blocksize) {
    const __m256 absmax = _mm256_set1_ps(block_absmax(w, block));
    dequantize_block<kPastCaches>(w.packed + block * w.blocksize / 2, w.blocksize, _mm256_mul_ps(low_values, absmax),
                                  _mm256_mul_ps(high_values, absmax), out);
  }
  if constexpr (kPastCaches) _mm_sfence();  // others see such stores in any order
}

}  // namespace

void dequantize_4bit_avx2(const Packed4bit& w, std::int64_t begin, std::int64_t end, DType dtype, void* out,
                          bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto blocks = past_caches ? dequantize_blocks<true, T> : dequantize_blocks<false, T>;
    blocks(w, begin, end, static_cast<T*>(out));
  });
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
