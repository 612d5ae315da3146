// quantize_4bit for AVX512 (F, BW, DQ, VL): whole blocks. The codes of 32 values at once take a comparison and a
// lookup.
#include "quantize.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "bf16_codes.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

// 32 values as fp32, every other one.
struct Values {
  __m512 even, odd;
};

inline Values load32(const BFloat16* from) {
  const __m512i words = _mm512_loadu_si512(from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
}

template <typename T>  // fp32 or fp16
Values load32(const T* from) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 first = load16(from), second = load16(from + 16);
  return {_mm512_permutex2var_ps(first, even, second), _mm512_permutex2var_ps(first, odd, second)};
}

// The 16 bytes of codes in 32 words: in each pair the even one, the low word, moves to the high nibble.
inline __m128i pack_codes(__m512i codes) {
  return _mm512_cvtepi32_epi8(_mm512_madd_epi16(codes, _mm512_set1_epi32(1 << 16 | 16)));
}

// The 64 bytes of 128 codes.
inline __m512i pack_codes(const __m512i (&codes)[4]) {
  const __m512i nibbles = _mm512_set1_epi16(1 << 8 | 16);
  const __m512i low = _mm512_maddubs_epi16(_mm512_packus_epi16(codes[0], codes[1]), nibbles);
  const __m512i high = _mm512_maddubs_epi16(_mm512_packus_epi16(codes[2], codes[3]), nibbles);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
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
      bounds[_mm_cvtsi128_si32(_mm512_castsi512_si128(bin_of(_mm512_set1_ps(each)))) & 31] = each;
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

  // In the lowest 5 bits, which are all that a lookup uses: ascending with x, 0 of NaN (whose low bits must be 0). A
  // value that rounding took beyond 1 still has a bin.
  static __m512i bin_of(__m512 x) {
    constexpr float kUnit = 1 << 23;  // numbers beyond have no fraction: their last bits are an integer
    return _mm512_castps_si512(_mm512_fmadd_round_ps(x, _mm512_set1_ps(15.9f), _mm512_set1_ps(kUnit + 16),
                                                     _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  }

  // The bin, and 32 more above its bound, in the lowest 6 bits.
  __m512i place_of(__m512 x) const {
    const __m512i bin = bin_of(x);
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(bound[0], bin, bound[1]), _CMP_GT_OQ);
    return _mm512_mask_add_epi32(bin, above, bin, _mm512_set1_epi32(32));
  }

  // The 16 bytes.
  __m128i operator()(Values x) const {
    const __m512i odd = _mm512_slli_epi32(place_of(x.odd), 16);
    const __m512i places = _mm512_mask_mov_epi16(odd, 0x55555555, place_of(x.even));
    return pack_codes(_mm512_permutex2var_epi16(code[0], places, code[1]));
  }
};

// The bits of the largest magnitudes of a block, in lanes of T's size: integers order floats of one sign, and NaN last.
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
  return largest;
}

template <typename T>
struct Larger {
  __m512 operator()(__m512 a, __m512 b) const {
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    return _mm512_castsi512_ps(sizeof(T) == 4 ? _mm512_max_epu32(x, y) : _mm512_max_epu16(x, y));
  }
};

// As fp32: the T in each dword, or the larger of two.
inline __m512 largest_float(__m512i bits, float) { return _mm512_castsi512_ps(bits); }

inline __m512i larger_word(__m512i bits) {
  return _mm512_max_epu32(_mm512_srli_epi32(bits, 16), _mm512_and_si512(bits, _mm512_set1_epi32(0xffff)));
}

inline __m512 largest_float(__m512i bits, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(larger_word(bits), 16));
}

inline __m512 largest_float(__m512i bits, Half) {  // vcvtph2ps would make a signalling NaN quiet
  std::uint16_t halves[16];
  float floats[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), _mm512_cvtepi32_epi16(larger_word(bits)));
  for (int i = 0; i < 16; ++i) floats[i] = to_float(Half{halves[i]});
  return _mm512_loadu_ps(floats);
}

// The low bits of a 16-bit NaN are 0, those of any other NaN are anything: it becomes -1, which has its code.
template <typename T>
__m512 scaled(__m512 x, __m512 scale) {
  const __m512 product = _mm512_mul_ps(x, scale);
  return sizeof(T) == 4 ? _mm512_max_ps(product, _mm512_set1_ps(-1.0f)) : product;
}

constexpr std::int64_t kTogether = 16;  // blocks: their absmax are found lane by lane

// Bytes of the weight between what is encoded and what is fetched to the L2. The CPU's own fetching comes too late
// where a part is read for its maxima, then is encoded for a while.
constexpr std::int64_t kFetchedAhead = 6144;

// kTogether blocks by kBf16Codes. kVectors: of 32 weights of a block, of the 4 that are packed together.
template <int kVectors>
void encode_by_steps(const BFloat16* w, std::int64_t blocksize, const std::uint32_t* absmax, std::uint8_t* packed) {
  for (std::int64_t block = 0; block < kTogether; block += 4 / kVectors) {
    for (std::int64_t i = block * blocksize; i < (block + 4 / kVectors) * blocksize; i += 128) {
      __m512i codes[4], positive{}, negative{}, lowest{};
#pragma GCC unroll 4
      for (int vector = 0; vector < 4; ++vector) {
        if (vector % kVectors == 0) {
          const std::uint32_t largest = absmax[block + vector / kVectors];
          const std::uint16_t* entry = kBf16Codes[largest & 0x7f].data();
          positive = _mm512_loadu_si512(entry), negative = _mm512_loadu_si512(entry + 32);
          lowest = _mm512_set1_epi16(static_cast<std::int16_t>(largest - (kBf16Steps - 1)));
        }
        const BFloat16* from = w + i + 32 * vector;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kFetchedAhead, 0, 2);
        const __m512i x = _mm512_loadu_si512(from);
        const __m512i step = _mm512_subs_epu16(_mm512_and_si512(x, _mm512_set1_epi16(0x7fff)), lowest);
        const __m512i key = _mm512_xor_si512(step, _mm512_srai_epi16(x, 15));
        const __m512i bin = _mm512_srli_epi16(key, kBf16BinBits);
        const __m512i sum = _mm512_add_epi16(key, _mm512_permutex2var_epi16(positive, bin, negative));
        codes[vector] = _mm512_srli_epi16(sum, kBf16BinBits);
      }
      _mm512_storeu_si512(packed + i / 2, pack_codes(codes));
    }
  }
}

// False: kBf16Codes does not hold for all of them.
inline bool encode_by_steps(const BFloat16* w, std::int64_t blocksize, __m512 absmax, std::uint8_t* packed) {
  const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(absmax), 16);
  const __m512i beyond = _mm512_sub_epi32(bits, _mm512_set1_epi32(kBf16AbsmaxBegin));
  if (_mm512_cmpge_epu32_mask(beyond, _mm512_set1_epi32(kBf16AbsmaxEnd - kBf16AbsmaxBegin)) != 0) return false;
  alignas(64) std::uint32_t largest[kTogether];
  _mm512_store_si512(largest, bits);
  const auto encode = blocksize == 32 ? encode_by_steps<1> : blocksize == 64 ? encode_by_steps<2> : encode_by_steps<4>;
  encode(w, blocksize, largest, packed);
  return true;
}

template <typename T>  // fp32 or fp16
bool encode_by_steps(const T*, std::int64_t, __m512, std::uint8_t*) {
  return false;
}

template <typename T>
void quantize_blocks(const T* weight, std::int64_t blocksize, QuantType quant_type, std::int64_t begin,
                     std::int64_t end, std::uint8_t* packed, float* absmax) {
  const Encoder encode(codebook(quant_type));
  for (std::int64_t first = begin; first < end; first += kTogether) {
    const std::int64_t blocks = smaller(end - first, kTogether);
    __m512 largest[kTogether];
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < kTogether; ++i) {  // beyond the last block: that once more
      const std::int64_t block = first + (i < blocks ? i : blocks - 1);
      largest[i] = _mm512_castsi512_ps(largest_magnitudes(weight + block * blocksize, blocksize));
    }
    const __m512 each = largest_float(_mm512_castps_si512(across_lanes(largest, Larger<T>{})), T{});
    _mm512_mask_storeu_ps(absmax + first, static_cast<__mmask16>((1u << blocks) - 1), each);
    const std::int64_t begins = first * blocksize;
    if (quant_type == QuantType::NF4 && blocks == kTogether &&
        encode_by_steps(weight + begins, blocksize, each, packed + begins / 2)) {
      continue;
    }
    alignas(64) float inverse[kTogether];
    // inverse_absmax of each: a minimum with NaN is its second operand.
    _mm512_store_ps(inverse, _mm512_min_ps(_mm512_set1_ps(kMaxInverse), _mm512_div_ps(_mm512_set1_ps(1.0f), each)));
    for (std::int64_t block = 0; block < blocks; ++block) {
      const __m512 scale = _mm512_set1_ps(inverse[block]);
      for (std::int64_t i = (first + block) * blocksize; i < (first + block + 1) * blocksize; i += 32) {
        const Values x = load32(weight + i);
        const __m128i bytes = encode({scaled<T>(x.even, scale), scaled<T>(x.odd, scale)});
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), bytes);
      }
    }
  }
}

}  // namespace

void quantize_4bit_avx512(const void* weight, DType dtype, std::int64_t blocksize, QuantType quant_type,
                          std::int64_t begin, std::int64_t end, std::uint8_t* packed, float* absmax) {
  with_type(dtype, [&](auto type) {
    quantize_blocks(static_cast<const decltype(type)*>(weight), blocksize, quant_type, begin, end, packed, absmax);
  });
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
