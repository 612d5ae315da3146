// AdamW for AVX512 (F, BW, DQ, VL): whole blocks, 16 elements at a time.
#include "adamw.h"
#include "dynamic_codes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "adamw_loops.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr std::int64_t kLanes = 16;

  static V splat(float x) { return _mm512_set1_ps(x); }
  static V multiply(V a, V b) { return _mm512_mul_ps(a, b); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V subtract(V a, V b) { return _mm512_sub_ps(a, b); }
  static V divide(V a, V b) { return _mm512_div_ps(a, b); }
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }

  template <typename T>
  static V load(const T* from) {
    return load16(from);
  }
  template <typename T>
  static void store(T* to, V x) {
    store16(to, x);
  }

  struct Random {
    __m512i low, high;  // halves of the key, the low ones with the elements' part

    explicit Random(std::uint64_t block_key)
        : low(_mm512_add_epi32(
              _mm512_set1_epi32(static_cast<int>(block_key)),
              _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                 _mm512_set1_epi32(static_cast<int>(kAdamwStride))))),
          high(_mm512_set1_epi32(static_cast<int>(block_key >> 32))) {}

    __m512i bits(std::int64_t i) const {
      const auto offset = static_cast<int>(static_cast<std::uint32_t>(i) * kAdamwStride);
      __m512i x = _mm512_add_epi32(low, _mm512_set1_epi32(offset));
      x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
      x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(kAdamwMix1)));
      x = _mm512_xor_si512(x, high);
      x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
      x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(kAdamwMix2)));
      return _mm512_srli_epi32(x, 16);
    }
  };

  static void round(BFloat16* to, V x, const Random& random, std::int64_t i) {
    const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(x), random.bits(i));
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                                  _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
  }

  struct Largest {
    __m512i largest;
    Largest() : largest(_mm512_setzero_si512()) {}
    void add(V x) {
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
    }
    std::uint32_t bits() const { return _mm512_reduce_max_epu32(largest); }
  };

  template <bool kSigned>
  struct Codes {
    static constexpr std::int64_t kEncoded = 64;
    __m512i end, last;
    __m512 scale, offset, width, half;

    static constexpr const DynamicCodebook& book() { return state_codebook<kSigned>(); }

    static __m512i twice(const void* line) {
      return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(line)));
    }

    Codes()
        : end(twice(kLines<kSigned>.end)),
          last(twice(kLines<kSigned>.last)),
          scale(_mm512_castsi512_ps(twice(kLines<kSigned>.scale))),
          offset(_mm512_castsi512_ps(twice(kLines<kSigned>.offset))),
          width(_mm512_castsi512_ps(twice(kCells<kSigned>.width))),
          half(_mm512_castsi512_ps(twice(kCells<kSigned>.half))) {}

    // b, with those bits of a that the mask has.
    static V merge(V a, V mask, V b) {
      return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(mask),
                                                           _mm512_castps_si512(b), 0xea));  // a & mask | b
    }

    V decode(const std::uint8_t* codes) const {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const __m512i from_zero = kSigned ? _mm512_sub_epi32(code, _mm512_set1_epi32(127)) : code;
      const __m512i n = kSigned ? _mm512_abs_epi32(from_zero) : _mm512_add_epi32(code, _mm512_set1_epi32(1));
      const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(n));
      const __m512i decade = _mm512_srli_epi32(bits, 23);
      const __m512 one = _mm512_set1_ps(1.0f), range = _mm512_set1_ps(kDecadeRange);
      const __m512 mantissa = merge(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffff)), one);
      const __mmask16 upper_half = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x400000));
      const __m512 end = _mm512_mask_mov_ps(_mm512_set1_ps(0.1f), upper_half, one);  // that the edges are counted from
      const __m512 place = _mm512_sub_ps(mantissa, _mm512_mask_mov_ps(one, upper_half, _mm512_set1_ps(2.0f)));
      const __m512 next = _mm512_add_ps(place, _mm512_permutexvar_ps(decade, width));
      const __m512 edges = _mm512_add_ps(_mm512_fmadd_ps(range, place, end), _mm512_fmadd_ps(range, next, end));
      const __m512 value =
          _mm512_maskz_mul_ps(_mm512_test_epi32_mask(from_zero, from_zero), edges, _mm512_permutexvar_ps(decade, half));
      if constexpr (!kSigned) return value;
      return merge(_mm512_castsi512_ps(from_zero), _mm512_set1_ps(-0.0f), value);
    }

    // 64 values.
    [[gnu::always_inline]] void encode(const float* values, float inverse, std::uint8_t* codes) const {
      __m512i code[4];
      __mmask16 sure[4];
      for (int i = 0; i < 4; ++i) {
        code[i] = find(_mm512_mul_ps(_mm512_loadu_ps(values + 16 * i), _mm512_set1_ps(inverse)), sure[i]);
      }
      // The packs work inside 128-bit lanes, and saturate: there is no -1 among the signed codes.
      const __m512i packed =
          _mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3]));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, packed));
      if (__builtin_expect((sure[0] & sure[1] & sure[2] & sure[3]) != 0xffff, 0)) {
        for (int i = 0; i < 64; i += 16) search(values + i, inverse, ~sure[i / 16] & 0xffffu, codes + i);
      }
    }

    // Those whose bits are set, as the format says.
    static void search(const float* values, float inverse, unsigned chosen, std::uint8_t* codes) {
      for (; chosen != 0; chosen &= chosen - 1) {
        const int i = __builtin_ctz(chosen);
        codes[i] = encode_dynamic(book().bound, values[i] * inverse);
      }
    }

    [[gnu::always_inline]] __m512i find(__m512 x, __mmask16& sure) const {
      const __m512i bits = _mm512_castps_si512(x);
      const __m512i magnitude = kSigned ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)) : bits;
      const __m512i upper = _mm512_max_epi32(_mm512_srli_epi32(magnitude, 16), _mm512_set1_epi32(Lines::kLeast));
      __m512i line = _mm512_mulhi_epi16(upper, _mm512_set1_epi32(Lines::kLog));
      const __m512i compared = kSigned ? _mm512_rol_epi32(bits, 1) : bits;
      const __mmask16 beyond = _mm512_cmpgt_epi32_mask(compared, _mm512_permutexvar_epi32(line, end));
      line = _mm512_mask_sub_epi32(line, beyond, line, _mm512_set1_epi32(-1));
      const __m512 on_line = _mm512_fmadd_ps(_mm512_castsi512_ps(magnitude), _mm512_permutexvar_ps(line, scale),
                                             _mm512_permutexvar_ps(line, offset));
      const __m512i sum = _mm512_min_epi32(_mm512_cvtps_epi32(on_line), _mm512_permutexvar_epi32(line, last));
      sure = _mm512_test_epi32_mask(sum, _mm512_set1_epi32(Lines::kSureMask));
      const __m512i rank = _mm512_srli_epi32(sum, Lines::kFractionBits);
      if constexpr (!kSigned)
        return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), rank);
      const __m512i zero = _mm512_set1_epi32(127);
      return _mm512_mask_sub_epi32(_mm512_add_epi32(zero, rank), _mm512_movepi32_mask(bits), zero, rank);
    }
  };
};

}  // namespace

void adamw_avx512(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  update_slice<Avx512>(task, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
