// dequantize_4bit for AVX512 (F, BW, DQ, VL): whole blocks. The block's table sits in one register; a lookup uses only
// the low bits of its index (5 of a word, 4 of a dword), so the nibbles need no masks: the 16-bit table stands there
// twice.
#include "dequantize_4bit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

template <bool kPastCaches>
inline void store(void* to, __m512i x) {
  kPastCaches ? _mm512_stream_si512(static_cast<__m512i*>(to), x) : _mm512_storeu_si512(to, x);
}

template <bool kPastCaches, typename T>  // bf16 or fp16
inline void dequantize_block(const std::uint8_t* packed, std::int64_t blocksize, __m512 products, T* out) {
  const __m512i table = _mm512_broadcast_i64x4(round16(products, T{}));
  for (std::int64_t i = 0; i < blocksize; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m512i dword = _mm512_cvtepu8_epi32(bytes);
    // Low word: the high nibble, which is the even element; high word: the whole byte, whose low nibble is the odd one.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(dword, 4), _mm512_slli_epi32(dword, 16));
    store<kPastCaches>(out + i, _mm512_permutexvar_epi16(index, table));
  }
}

template <bool kPastCaches>
inline void dequantize_block(const std::uint8_t* packed, std::int64_t blocksize, __m512 products, float* out) {
  for (std::int64_t i = 0; i < blocksize; i += 16) {
    store<kPastCaches>(out + i, _mm512_castps_si512(_mm512_permutexvar_ps(indices(packed + i / 2), products)));
  }
}

template <bool kPastCaches, typename T>
void dequantize_blocks(const Packed4bit& w, std::int64_t begin, std::int64_t end, T* out) {
  const __m512 values = _mm512_loadu_ps(codebook(w.quant_type).value);
  for (std::int64_t block = begin; block < end; ++block, out += w.blocksize) {
    const __m512 products = _mm512_mul_ps(values, _mm512_set1_ps(block_absmax(w, block)));
    dequantize_block<kPastCaches>(w.packed + block * w.blocksize / 2, w.blocksize, products, out);
  }
  if constexpr (kPastCaches) _mm_sfence();  // others see such stores in any order
}

}  // namespace

void dequantize_4bit_avx512(const Packed4bit& w, std::int64_t begin, std::int64_t end, DType dtype, void* out,
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
