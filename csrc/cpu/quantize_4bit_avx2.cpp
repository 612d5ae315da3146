// quantize_4bit for AVX2: whole blocks, 32 values at a time, ranked by four steps of a binary search.
#include "quantize.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "bf16_codes.h"

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
  __m256i largest[2] = {};
  for (std::int64_t i = 0; i < blocksize; i += 32) {
    for (int j = 0; j < 2; ++j) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i + 16 * j));
      largest[j] = _mm256_max_epu16(largest[j], _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
    }
  }
  const __m256i both = _mm256_max_epu16(largest[0], largest[1]);
  const __m128i words = _mm_max_epu16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(words, _mm_set1_epi16(-1)));  // of the complements
  return to_float(T{static_cast<std::uint16_t>(~_mm_cvtsi128_si32(least))});
}

// The 16 bytes of 32 codes, one a byte.
inline __m128i pack_codes(__m256i codes) {
  const __m256i word = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // even * 16 + odd
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi16(word, word), 0b1000));
}

inline __m256i load_words(const std::int16_t (&words)[8]) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(words)));
}

// The codes of 16 keys among bounds.
struct KeySearch {
  __m256i middle, quarters, eighths, sixteenths;

  explicit KeySearch(const Bf16Bounds& bounds)
      : middle(_mm256_set1_epi16(bounds.middle)),
        quarters(load_words(bounds.quarters)),
        eighths(load_words(bounds.eighths)),
        sixteenths(load_words(bounds.sixteenths)) {}

  // In both bytes of a word, where the key is above the bound.
  static __m256i above(__m256i key, __m256i bound, int value) {
    return _mm256_and_si256(_mm256_cmpgt_epi16(key, bound), _mm256_set1_epi8(static_cast<char>(value)));
  }

  __m256i operator()(__m256i key) const {
    __m256i at = _mm256_set1_epi16(1 << 8);  // in bytes: a word's second is the one after its first
    at = _mm256_add_epi8(at, above(key, middle, 8));
    at = _mm256_add_epi8(at, above(key, _mm256_shuffle_epi8(quarters, at), 4));
    at = _mm256_add_epi8(at, above(key, _mm256_shuffle_epi8(eighths, at), 2));
    const __m256i last = _mm256_cmpgt_epi16(key, _mm256_shuffle_epi8(sixteenths, at));
    return _mm256_and_si256(_mm256_sub_epi16(at, last), _mm256_set1_epi16(0xf));
  }
};

// The codes of blocks by kBf16Bounds; false: they do not hold for all of them. A function of its own, so that what its
// loop needs stays in registers.
[[gnu::noinline]] bool encode_by_steps(const BFloat16* weight, std::int64_t blocksize, std::int64_t begin,
                                       std::int64_t end, const float* absmax, std::uint8_t* packed) {
  const auto bits_of_absmax = [&](std::int64_t block) {
    return __builtin_bit_cast(std::uint32_t, absmax[block]) >> 16;
  };
  for (std::int64_t block = begin; block < end; ++block) {
    if (bits_of_absmax(block) - kBf16AbsmaxBegin >= kBf16AbsmaxEnd - kBf16AbsmaxBegin) return false;
  }
  for (std::int64_t block = begin; block < end; ++block) {
    const BFloat16* w = weight + block * blocksize;
    std::uint8_t* out = packed + block * blocksize / 2;
    const std::uint32_t largest = bits_of_absmax(block);
    const __m256i lowest = _mm256_set1_epi16(static_cast<std::int16_t>(largest - (kBf16Steps - 1)));
    const KeySearch search(kBf16Bounds[largest & 0x7f]);
    for (std::int64_t i = 0; i < blocksize; i += 32) {
      __m256i codes[2];
      for (int j = 0; j < 2; ++j) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i + 16 * j));
        const __m256i step = _mm256_subs_epu16(_mm256_and_si256(x, _mm256_set1_epi16(0x7fff)), lowest);
        codes[j] = search(_mm256_sign_epi16(step, x));
      }
      const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(codes[0], codes[1]), 0b11011000);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i / 2), pack_codes(bytes));
    }
  }
  return true;
}

template <typename T>  // fp32 or fp16
bool encode_by_steps(const T*, std::int64_t, std::int64_t, std::int64_t, const float*, std::uint8_t*) {
  return false;
}

// Absmax of some blocks is found before their codes are: a CPU does not look so far ahead that it could begin a block
// while it waits for another's.
constexpr std::int64_t kTogether = 16;

template <typename T>
void quantize_blocks(const T* weight, std::int64_t blocksize, QuantType quant_type, std::int64_t begin,
                     std::int64_t end, std::uint8_t* packed, float* absmax) {
  const Codebook& book = codebook(quant_type);
  const Encoder encoder(book);
  const __m256i code_of_rank =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.code_of_rank)));
  for (std::int64_t first = begin; first < end; first += kTogether) {
    const std::int64_t last = smaller(first + kTogether, end);
    for (std::int64_t block = first; block < last; ++block) {
      absmax[block] = largest_magnitude(weight + block * blocksize, blocksize);
    }
    if (quant_type == QuantType::NF4 && encode_by_steps(weight, blocksize, first, last, absmax, packed)) continue;
    for (std::int64_t block = first; block < last; ++block) {
      const T* w = weight + block * blocksize;
      std::uint8_t* out = packed + block * blocksize / 2;
      const __m256 inverse = _mm256_set1_ps(inverse_absmax(absmax[block]));
      for (std::int64_t i = 0; i < blocksize; i += 32) {
        __m256i rank[4];
        for (int j = 0; j < 4; ++j) rank[j] = encoder(_mm256_mul_ps(load8(w + i + 8 * j), inverse));
        // The two packs work inside 128-bit lanes; the permutation of dwords puts the 32 bytes back in order.
        const __m256i bytes =
            _mm256_packus_epi16(_mm256_packus_epi32(rank[0], rank[1]), _mm256_packus_epi32(rank[2], rank[3]));
        const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m128i pairs = pack_codes(_mm256_shuffle_epi8(code_of_rank, ordered));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i / 2), pairs);
      }
    }
  }
}

}  // namespace

void quantize_4bit_avx2(const void* weight, DType dtype, std::int64_t blocksize, QuantType quant_type,
                        std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax) {
  with_type(dtype, [&](auto type) {
    quantize_blocks(static_cast<const decltype(type)*>(weight), blocksize, quant_type, begin, end, packed, absmax);
  });
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
