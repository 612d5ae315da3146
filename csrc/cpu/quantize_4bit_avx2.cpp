// quantize_4bit for AVX2: whole blocks, 32 values at a time. The rank is counted by 15 compares.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

inline __m256i rank8(__m256 x, const Codebook& book) {
  __m256i rank = _mm256_setzero_si256();
  for (int i = 0; i < kNumCodes - 1; ++i) {  // a true compare is -1
    const __m256 above = _mm256_cmp_ps(x, _mm256_set1_ps(book.bound[i]), _CMP_GT_OQ);
    rank = _mm256_sub_epi32(rank, _mm256_castps_si256(above));
  }
  return rank;
}

inline float reduce_max(__m256i bits) {
  alignas(32) std::uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), bits);
  std::uint32_t largest = lanes[0];
  for (int i = 1; i < 8; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return __builtin_bit_cast(float, largest);
}

template <typename T>
void quantize_blocks(const T* weight, std::int64_t blocksize, const Codebook& book, std::int64_t begin,
                     std::int64_t end, std::uint8_t* packed, float* absmax) {
  const __m256i code_of_rank =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.code_of_rank)));
  for (std::int64_t block = begin; block < end; ++block) {
    const T* w = weight + block * blocksize;
    std::uint8_t* out = packed + block * blocksize / 2;
    __m256i largest = _mm256_setzero_si256();  // integer maximum of the bits of |w|: NaN is the largest
    for (std::int64_t i = 0; i < blocksize; i += 8) {
      const __m256i bits = _mm256_castps_si256(load8(w + i));
      largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    absmax[block] = reduce_max(largest);
    const __m256 inverse = _mm256_set1_ps(inverse_absmax(absmax[block]));
    for (std::int64_t i = 0; i < blocksize; i += 32) {
      __m256i rank[4];
      for (int j = 0; j < 4; ++j) rank[j] = rank8(_mm256_mul_ps(load8(w + i + 8 * j), inverse), book);
      // The two packs work inside 128-bit lanes; the permutation of dwords puts the 32 bytes back in order.
      const __m256i bytes =
          _mm256_packus_epi16(_mm256_packus_epi32(rank[0], rank[1]), _mm256_packus_epi32(rank[2], rank[3]));
      const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      const __m256i code = _mm256_shuffle_epi8(code_of_rank, ordered);
      const __m256i word = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x0110));  // even * 16 + odd
      const __m256i half = _mm256_permute4x64_epi64(_mm256_packus_epi16(word, word), 0b1000);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i / 2), _mm256_castsi256_si128(half));
    }
  }
}

}  // namespace

void quantize_4bit_avx2(const void* weight, DType dtype, std::int64_t blocksize, QuantType quant_type,
                        std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax) {
  with_type(dtype, [&](auto type) {
    quantize_blocks(static_cast<const decltype(type)*>(weight), blocksize, codebook(quant_type), begin, end, packed,
                    absmax);
  });
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
