// quantize_4bit for AVX512 (F, BW, DQ, VL): whole blocks. The codes of 32 values at once take a comparison and a
// lookup.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

// 32 values as fp32: those of a 16-bit vector that unpack to its low words, and to its high ones.
struct Values {
  __m512 low, high;
};

inline Values load32(const BFloat16* from) {
  const __m512i words = _mm512_loadu_si512(from), zero = _mm512_setzero_si512();
  return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, words)),
          _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, words))};
}

template <typename T>  // fp32 or fp16
Values load32(const T* from) {
  const __m512 first = load16(from), second = load16(from + 16);
  return {_mm512_shuffle_f32x4(first, second, 0b10001000), _mm512_shuffle_f32x4(first, second, 0b11011101)};
}

// [-1, 1] in 32 bins, so narrow that no two bounds of a codebook are in one. A value is above all bounds of the bins
// below its own, and below those of the bins above: the one in its bin, if any, it is compared with.
struct Encoder {
  __m512 bound[2];  // of the bins; above all values where there is none
  __m512i code[2];  // of a value in the bin: below its bound, and above

  explicit Encoder(const Codebook& book) {
    float bounds[32];
    std::uint16_t codes[2][32];
    for (float& each : bounds) each = 2.0f;
    for (const float each : book.bound) {
      if (each > 1.0f) continue;  // none
      bounds[_mm_cvtsi128_si32(_mm512_castsi512_si128(bin_of(_mm512_set1_ps(each))))] = each;
    }
    int rank = 0;
    for (int bin = 0; bin < 32; ++bin) {
      codes[0][bin] = book.code_of_rank[rank];
      if (bounds[bin] <= 1.0f) ++rank;
      codes[1][bin] = book.code_of_rank[rank];
    }
    for (int half = 0; half < 2; ++half) {
      bound[half] = _mm512_loadu_ps(bounds + 16 * half);
      code[half] = _mm512_loadu_si512(codes[half]);
    }
  }

  // Ascending with x; a value that rounding took beyond 1 still has a bin. A lookup uses the lowest 5 bits: NaN has 0.
  static __m512i bin_of(__m512 x) {
    return _mm512_cvttps_epi32(_mm512_fmadd_ps(x, _mm512_set1_ps(15.9f), _mm512_set1_ps(16.0f)));
  }

  // The bin, and 32 more above its bound.
  __m512i place_of(__m512 x) const {
    const __m512i bin = bin_of(x);
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(bound[0], bin, bound[1]), _CMP_GT_OQ);
    return _mm512_mask_add_epi32(bin, above, bin, _mm512_set1_epi32(32));
  }

  // The 16 bytes.
  __m128i operator()(Values x) const {
    const __m512i places = _mm512_packs_epi32(place_of(x.low), place_of(x.high));
    const __m512i codes = _mm512_permutex2var_epi16(code[0], places, code[1]);
    // In each pair the even one, the low word, moves to the high nibble.
    return _mm512_cvtepi32_epi8(_mm512_madd_epi16(codes, _mm512_set1_epi32(1 << 16 | 16)));
  }
};

// The largest magnitudes of a block, the bits of one in each dword: integers order floats of one sign, and NaN last.
inline __m512i largest_magnitudes(const float* w, std::int64_t blocksize) {
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < blocksize; i += 16) {
    const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(w + i), _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_max_epu32(largest, magnitude);
  }
  return largest;
}

template <typename T>  // bf16 or fp16
__m512i largest_magnitudes(const T* w, std::int64_t blocksize) {
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < blocksize; i += 32) {
    const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(w + i), _mm512_set1_epi16(0x7fff));
    largest = _mm512_max_epu16(largest, magnitude);
  }
  const __m512i odd = _mm512_srli_epi32(largest, 16), even = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff));
  return _mm512_max_epu32(even, odd);
}

struct LargerBits {
  __m512 operator()(__m512 a, __m512 b) const {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

// A T's bits in each dword, as fp32.
inline __m512 to_floats(__m512i bits, float) { return _mm512_castsi512_ps(bits); }

inline __m512 to_floats(__m512i bits, BFloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)); }

inline __m512 to_floats(__m512i bits, Half) {  // vcvtph2ps would make a signalling NaN quiet
  std::uint16_t halves[16];
  float floats[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), _mm512_cvtepi32_epi16(bits));
  for (int i = 0; i < 16; ++i) floats[i] = to_float(Half{halves[i]});
  return _mm512_loadu_ps(floats);
}

constexpr std::int64_t kTogether = 16;  // blocks: their absmax are found lane by lane

template <typename T>
void quantize_blocks(const T* weight, std::int64_t blocksize, const Codebook& book, std::int64_t begin,
                     std::int64_t end, std::uint8_t* packed, float* absmax) {
  const Encoder encode(book);
  for (std::int64_t first = begin; first < end; first += kTogether) {
    const std::int64_t blocks = end - first < kTogether ? end - first : kTogether;
    __m512 largest[kTogether] = {};
    for (std::int64_t i = 0; i < blocks; ++i) {
      largest[i] = _mm512_castsi512_ps(largest_magnitudes(weight + (first + i) * blocksize, blocksize));
    }
    const __m512 found = across_lanes(largest, LargerBits{});
    const __m512 each = to_floats(_mm512_castps_si512(found), T{});
    float found_absmax[kTogether], inverse[kTogether];
    _mm512_storeu_ps(found_absmax, each);
    for (std::int64_t i = 0; i < blocks; ++i) absmax[first + i] = found_absmax[i];
    // inverse_absmax of each: a maximum with NaN is its second operand.
    _mm512_storeu_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(_mm512_set1_ps(1e-38f), each)));
    for (std::int64_t block = 0; block < blocks; ++block) {
      const __m512 scale = _mm512_set1_ps(inverse[block]);
      for (std::int64_t i = (first + block) * blocksize; i < (first + block + 1) * blocksize; i += 32) {
        const Values x = load32(weight + i);
        const __m128i bytes = encode({_mm512_mul_ps(x.low, scale), _mm512_mul_ps(x.high, scale)});
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), bytes);
      }
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
