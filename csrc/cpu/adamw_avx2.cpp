// AdamW for AVX2: whole blocks, 8 elements at a time.
#include "adamw.h"
#include "dynamic_codes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "adamw_loops.h"
#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr std::int64_t kLanes = 8;

  static V splat(float x) { return _mm256_set1_ps(x); }
  static V multiply(V a, V b) { return _mm256_mul_ps(a, b); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V subtract(V a, V b) { return _mm256_sub_ps(a, b); }
  static V divide(V a, V b) { return _mm256_div_ps(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }

  template <typename T>
  static V load(const T* from) {
    return load8(from);
  }
  template <typename T>
  static void store(T* to, V x) {
    store8(to, x);
  }

  struct Random {
    __m256i low, high;  // halves of the key, the low ones with the elements' part

    explicit Random(std::uint64_t block_key)
        : low(_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block_key)),
                               _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                                  _mm256_set1_epi32(static_cast<int>(kAdamwStride))))),
          high(_mm256_set1_epi32(static_cast<int>(block_key >> 32))) {}

    __m256i bits(std::int64_t i) const {
      const auto offset = static_cast<int>(static_cast<std::uint32_t>(i) * kAdamwStride);
      __m256i x = _mm256_add_epi32(low, _mm256_set1_epi32(offset));
      x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
      x = _mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int>(kAdamwMix1)));
      x = _mm256_xor_si256(x, high);
      x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
      x = _mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int>(kAdamwMix2)));
      return _mm256_srli_epi32(x, 16);
    }
  };

  static void round(BFloat16* to, V x, const Random& random, std::int64_t i) {
    const __m256i sum = _mm256_add_epi32(_mm256_castps_si256(x), random.bits(i));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i dwords = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(dwords, dwords), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(words));
  }

  struct Largest {
    __m256i largest;
    Largest() : largest(_mm256_setzero_si256()) {}
    void add(V x) {
      largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
    }
    std::uint32_t bits() const {
      alignas(32) std::uint32_t lanes[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
      std::uint32_t most = 0;
      for (std::uint32_t lane : lanes) most = lane > most ? lane : most;
      return most;
    }
  };

  template <bool kSigned>
  struct Codes {
    static constexpr std::int64_t kDecoded = 1, kEncoded = 32;
    __m256i end, last;
    __m256 scale, offset, width, half;

    static constexpr const DynamicCodebook& book() { return state_codebook<kSigned>(); }

    Codes()
        : end(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLines<kSigned>.end))),
          last(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLines<kSigned>.last))),
          scale(_mm256_loadu_ps(kLines<kSigned>.scale)),
          offset(_mm256_loadu_ps(kLines<kSigned>.offset)),
          width(_mm256_loadu_ps(kCells<kSigned>.width)),
          half(_mm256_loadu_ps(kCells<kSigned>.half)) {}

    void decode(const std::uint8_t* codes, V* out) const {
      const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
      const __m256i from_zero = kSigned ? _mm256_sub_epi32(code, _mm256_set1_epi32(127)) : code;
      const __m256i n = kSigned ? _mm256_abs_epi32(from_zero) : _mm256_add_epi32(code, _mm256_set1_epi32(1));
      const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(n));
      const __m256i decade = _mm256_srli_epi32(bits, 23);
      const __m256 one = _mm256_set1_ps(1.0f), range = _mm256_set1_ps(kDecadeRange);
      const __m256 mantissa =
          _mm256_or_ps(_mm256_and_ps(_mm256_castsi256_ps(bits), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff))), one);
      const __m256 upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 9));   // in the sign
      const __m256 end = _mm256_blendv_ps(_mm256_set1_ps(0.1f), one, upper_half);  // that the edges are counted from
      const __m256 place = _mm256_sub_ps(mantissa, _mm256_blendv_ps(one, _mm256_set1_ps(2.0f), upper_half));
      const __m256 next = _mm256_add_ps(place, _mm256_permutevar8x32_ps(width, decade));
      const __m256 edges = _mm256_add_ps(_mm256_fmadd_ps(range, place, end), _mm256_fmadd_ps(range, next, end));
      const __m256 value = _mm256_mul_ps(edges, _mm256_permutevar8x32_ps(half, decade));
      const __m256i is_zero = _mm256_cmpeq_epi32(from_zero, _mm256_setzero_si256());
      const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(from_zero), _mm256_set1_ps(-0.0f));
      *out = _mm256_andnot_ps(_mm256_castsi256_ps(is_zero), kSigned ? _mm256_or_ps(value, sign) : value);
    }

    // 32 values.
    [[gnu::always_inline]] void encode(const float* values, float inverse, std::uint8_t* codes) const {
      __m256i code[4], unsure[4];
      for (int i = 0; i < 4; ++i) {
        code[i] = find(_mm256_mul_ps(_mm256_loadu_ps(values + 8 * i), _mm256_set1_ps(inverse)), unsure[i]);
      }
      // The packs work inside 128-bit lanes, and saturate: there is no -1 among the signed codes.
      const __m256i packed =
          _mm256_packus_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
      const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), ordered);
      const __m256i any = _mm256_or_si256(_mm256_or_si256(unsure[0], unsure[1]), _mm256_or_si256(unsure[2], unsure[3]));
      if (__builtin_expect(_mm256_movemask_epi8(any) != 0, 0)) {
        for (int i = 0; i < 32; i += 8) {
          const int lanes = _mm256_movemask_ps(_mm256_castsi256_ps(unsure[i / 8]));
          search(values + i, inverse, static_cast<unsigned>(lanes), codes + i);
        }
      }
    }

    // Those whose bits are set, as the format says.
    static void search(const float* values, float inverse, unsigned chosen, std::uint8_t* codes) {
      for (; chosen != 0; chosen &= chosen - 1) {
        const int i = __builtin_ctz(chosen);
        codes[i] = encode_dynamic(book().bound, values[i] * inverse);
      }
    }

    [[gnu::always_inline]] __m256i find(__m256 x, __m256i& unsure) const {
      const __m256i bits = _mm256_castps_si256(x);
      const __m256i sign = _mm256_srai_epi32(bits, 31);  // -1: negative
      const __m256i magnitude = kSigned ? _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)) : bits;
      const __m256i upper = _mm256_max_epi32(_mm256_srli_epi32(magnitude, 16), _mm256_set1_epi32(Lines::kLeast));
      __m256i line = _mm256_mulhi_epi16(upper, _mm256_set1_epi32(Lines::kLog));
      const __m256i compared = kSigned ? _mm256_sub_epi32(_mm256_add_epi32(bits, bits), sign) : bits;
      line = _mm256_sub_epi32(line, _mm256_cmpgt_epi32(compared, _mm256_permutevar8x32_epi32(end, line)));
      const __m256 on_line = _mm256_fmadd_ps(_mm256_castsi256_ps(magnitude), _mm256_permutevar8x32_ps(scale, line),
                                             _mm256_permutevar8x32_ps(offset, line));
      const __m256i sum = _mm256_min_epi32(_mm256_cvtps_epi32(on_line), _mm256_permutevar8x32_epi32(last, line));
      unsure = _mm256_cmpeq_epi32(_mm256_and_si256(sum, _mm256_set1_epi32(Lines::kSureMask)), _mm256_setzero_si256());
      const __m256i rank = _mm256_srli_epi32(sum, Lines::kFractionBits);
      if constexpr (!kSigned) return _mm256_and_si256(rank, _mm256_cmpgt_epi32(bits, _mm256_setzero_si256()));
      const __m256i signed_rank = _mm256_sub_epi32(_mm256_xor_si256(rank, sign), sign);
      return _mm256_add_epi32(_mm256_set1_epi32(127), signed_rank);
    }
  };
};

}  // namespace

void adamw_avx2(const AdamwTask& task, std::int64_t begin, std::int64_t end) { update_slice<Avx2>(task, begin, end); }

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
