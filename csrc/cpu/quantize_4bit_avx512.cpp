// quantize_4bit for AVX512 (F, BW, DQ, VL): whole blocks. The rank of 16 values at once is a binary search of four
// steps, each one table lookup in a register and one compare.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct Encoder {
  // Step s asks whether x > bound[rank + s - 1], where rank is the sum of the earlier steps: the table of step s holds
  // the bounds moved up by s - 1, so that rank itself is the index.
  __m512 bounds[4];
  __m512i code_of_rank;

  explicit Encoder(const Codebook& book) {
    alignas(64) float moved[kNumCodes];
    for (int s = 0; s < 4; ++s) {
      const int step = 8 >> s;
      for (int i = 0; i < kNumCodes; ++i) moved[i] = i + step - 1 < kNumCodes - 1 ? book.bound[i + step - 1] : 2.0f;
      bounds[s] = _mm512_load_ps(moved);
    }
    code_of_rank = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.code_of_rank)));
  }

  __m512i operator()(__m512 x) const {
    __m512i rank = _mm512_setzero_si512();
    for (int s = 0; s < 4; ++s) {
      const __m512 bound = _mm512_permutexvar_ps(rank, bounds[s]);
      rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), rank, _mm512_set1_epi32(8 >> s));
    }
    return _mm512_permutexvar_epi32(rank, code_of_rank);
  }
};

template <typename T>
void quantize_blocks(const T* weight, std::int64_t blocksize, const Codebook& book, std::int64_t begin,
                     std::int64_t end, std::uint8_t* packed, float* absmax) {
  const Encoder encode16(book);
  for (std::int64_t block = begin; block < end; ++block) {
    const T* w = weight + block * blocksize;
    std::uint8_t* out = packed + block * blocksize / 2;
    __m512i largest = _mm512_setzero_si512();  // integer maximum of the bits of |w|: NaN is the largest
    for (std::int64_t i = 0; i < blocksize; i += 16) {
      const __m512i bits = _mm512_castps_si512(load16(w + i));
      largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    absmax[block] = __builtin_bit_cast(float, _mm512_reduce_max_epu32(largest));
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
