// quantize_4bit for AVX512 (F, BW, DQ, VL): whole blocks. The rank of 16 values at once takes one lookup of two tables
// in registers and one comparison.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

// [-1, 1] in 32 bins, so narrow that no two bounds of a codebook are in one. A value is above all bounds of the bins
// below its own, and below those of the bins above: the one in its bin, if any, it is compared with.
struct Encoder {
  __m512 bound[2];  // of the bins; above all values where there is none
  __m512i rank[2];  // the number of bounds in the bins below
  __m512i code_of_rank;

  explicit Encoder(const Codebook& book) {
    float bounds[32];
    std::int32_t ranks[32] = {};
    for (float& each : bounds) each = 2.0f;
    for (const float each : book.bound) {
      if (each > 1.0f) continue;  // none
      const int bin = _mm_cvtsi128_si32(_mm512_castsi512_si128(bin_of(_mm512_set1_ps(each))));
      bounds[bin] = each;
      for (int above = bin + 1; above < 32; ++above) ++ranks[above];
    }
    for (int half = 0; half < 2; ++half) {
      bound[half] = _mm512_loadu_ps(bounds + 16 * half);
      rank[half] = _mm512_loadu_si512(ranks + 16 * half);
    }
    code_of_rank = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.code_of_rank)));
  }

  // Ascending with x; a value that rounding took beyond 1 still has a bin. A lookup uses the lowest 5 bits: NaN has 0.
  static __m512i bin_of(__m512 x) {
    return _mm512_cvttps_epi32(_mm512_fmadd_ps(x, _mm512_set1_ps(15.9f), _mm512_set1_ps(16.0f)));
  }

  __m512i operator()(__m512 x) const {
    const __m512i bin = bin_of(x);
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(bound[0], bin, bound[1]), _CMP_GT_OQ);
    const __m512i below = _mm512_permutex2var_epi32(rank[0], bin, rank[1]);
    return _mm512_permutexvar_epi32(_mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1)), code_of_rank);
  }
};

// The largest |w|, by its bits: integers order floats of one sign, and NaN last.
inline float largest_magnitude(const float* w, std::int64_t blocksize) {
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < blocksize; i += 16) {
    const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(w + i), _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_max_epu32(largest, magnitude);
  }
  return __builtin_bit_cast(float, _mm512_reduce_max_epu32(largest));
}

template <typename T>  // bf16 or fp16
float largest_magnitude(const T* w, std::int64_t blocksize) {
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < blocksize; i += 32) {
    const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(w + i), _mm512_set1_epi16(0x7fff));
    largest = _mm512_max_epu16(largest, magnitude);
  }
  const __m512i odd = _mm512_srli_epi32(largest, 16), even = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff));
  return to_float(T{static_cast<std::uint16_t>(_mm512_reduce_max_epu32(_mm512_max_epu32(even, odd)))});
}

template <typename T>
void quantize_blocks(const T* weight, std::int64_t blocksize, const Codebook& book, std::int64_t begin,
                     std::int64_t end, std::uint8_t* packed, float* absmax) {
  const Encoder encode16(book);
  for (std::int64_t block = begin; block < end; ++block) {
    const T* w = weight + block * blocksize;
    std::uint8_t* out = packed + block * blocksize / 2;
    absmax[block] = largest_magnitude(w, blocksize);
    const __m512 inverse = _mm512_set1_ps(inverse_absmax(absmax[block]));
    for (std::int64_t i = 0; i < blocksize; i += 16) {
      const __m512i code = encode16(_mm512_mul_ps(load16(w + i), inverse));
      // In each pair of codes the even one is the low dword: it moves to the high nibble of the byte.
      const __m512i byte = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2), _mm512_cvtepi64_epi8(byte));
    }
  }
}

}  // namespace

void quantize_4bit_avx512(const void* weight, DType dtype, std::int64_t blocksize, QuantType quant_type,
                          std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax) {
  with_type(dtype, [&](auto type) {
    quantize_blocks(static_cast<const decltype(type)*>(weight), blocksize, codebook(quant_type), begin, end, packed,
                    absmax);
  });
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
