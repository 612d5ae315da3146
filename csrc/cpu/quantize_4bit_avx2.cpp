// quantize_4bit for AVX2: whole blocks, 32 values at a time, ranked by four steps of a binary search.
#include "quantize.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

struct Encoder {
  // Four steps of a binary search among the 15 bounds, with sums of compares (0 or -1) as the index of the next bound:
  // it is negative, and vpermps looks at its lowest 3 bits, so entry -i mod 8 of a table is that of index -i.
  __m256 middle, low_quarter, high_quarter, eighths, sixteenths;

  explicit Encoder(const Codebook& book)
      : middle(_mm256_set1_ps(book.bound[7])),
        low_quarter(_mm256_set1_ps(book.bound[3])),
        high_quarter(_mm256_set1_ps(book.bound[11])) {
    float eighth[8] = {}, sixteenth[8];
    for (int i = 0; i < 4; ++i) eighth[-i & 7] = book.bound[4 * i + 1];
    for (int i = 0; i < 8; ++i) sixteenth[-i & 7] = book.bound[2 * i];
    eighths = _mm256_loadu_ps(eighth);
    sixteenths = _mm256_loadu_ps(sixteenth);
  }

  static __m256i above(__m256 x, __m256 bound) { return _mm256_castps_si256(_mm256_cmp_ps(x, bound, _CMP_GT_OQ)); }
  static __m256i twice_plus(__m256i a, __m256i b) { return _mm256_add_epi32(_mm256_add_epi32(a, a), b); }

  // The number of bounds below each x.
  __m256i operator()(__m256 x) const {
    const __m256i half = above(x, middle);
    const __m256 quarter = _mm256_blendv_ps(low_quarter, high_quarter, _mm256_castsi256_ps(half));
    __m256i rank = twice_plus(half, above(x, quarter));
    rank = twice_plus(rank, above(x, _mm256_permutevar8x32_ps(eighths, rank)));
    rank = twice_plus(rank, above(x, _mm256_permutevar8x32_ps(sixteenths, rank)));
    return _mm256_sub_epi32(_mm256_setzero_si256(), rank);
  }
};

// The largest |w|, by its bits: integers order floats of one sign, and NaN last.
inline float largest_magnitude(const float* w, std::int64_t blocksize) {
  __m256i largest = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < blocksize; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  return __builtin_bit_cast(float, largest_lane(largest));
}

template <typename T>  // bf16 or fp16
float largest_magnitude(const T* w, std::int64_t blocksize) {
  __m256i largest = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < blocksize; i += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i));
    largest = _mm256_max_epu16(largest, _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
  }
  const __m256i odd = _mm256_srli_epi32(largest, 16), even = _mm256_and_si256(largest, _mm256_set1_epi32(0xffff));
  return to_float(T{static_cast<std::uint16_t>(largest_lane(_mm256_max_epu32(even, odd)))});
}

template <typename T>
void quantize_blocks(const T* weight, std::int64_t blocksize, const Codebook& book, std::int64_t begin,
                     std::int64_t end, std::uint8_t* packed, float* absmax) {
  const Encoder encoder(book);
  const __m256i code_of_rank =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.code_of_rank)));
  for (std::int64_t block = begin; block < end; ++block) {
    const T* w = weight + block * blocksize;
    std::uint8_t* out = packed + block * blocksize / 2;
    absmax[block] = largest_magnitude(w, blocksize);
    const __m256 inverse = _mm256_set1_ps(inverse_absmax(absmax[block]));
    for (std::int64_t i = 0; i < blocksize; i += 32) {
      __m256i rank[4];
      for (int j = 0; j < 4; ++j) rank[j] = encoder(_mm256_mul_ps(load8(w + i + 8 * j), inverse));
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
