// AdamW for AVX512 (F, BW, DQ, VL): whole blocks, 16 elements at a time.
#include "adamw.h"

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
    static constexpr std::int64_t kLanes = 16;
    __m512i end, last;
    __m512 scale, offset;

    static constexpr const DynamicCodebook& book() { return state_codebook<kSigned>(); }

    static __m512i twice(const void* line) {
      return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(line)));
    }

    Codes()
        : end(twice(kLines<kSigned>.end)),
          last(twice(kLines<kSigned>.last)),
          scale(_mm512_castsi512_ps(twice(kLines<kSigned>.scale))),
          offset(_mm512_castsi512_ps(twice(kLines<kSigned>.offset))) {}

    // Eight lookups in 32 values each, of which three bits of the code choose.
    static V decode(const std::uint8_t* codes) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      __m512 value[8];
      for (int i = 0; i < 8; ++i) {
        const float* const from = book().value + 32 * i;
        value[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(from), code, _mm512_loadu_ps(from + 16));
      }
      for (int count = 4, bit = 32; count > 0; count /= 2, bit *= 2) {
        const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(bit));
        for (int i = 0; i < count; ++i) value[i] = _mm512_mask_mov_ps(value[2 * i], upper, value[2 * i + 1]);
      }
      return value[0];
    }

    void encode(const float* values, float inverse, std::uint8_t* codes) const {
      __m512 x = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(inverse));
      if constexpr (!kSigned) x = _mm512_max_ps(x, _mm512_setzero_ps());
      const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
      const __m512i magnitude = kSigned ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)) : bits;
      const __m512i upper = _mm512_max_epi32(_mm512_srli_epi32(magnitude, 16), _mm512_set1_epi32(Lines::kLeast));
      __m512i line = _mm512_mulhi_epu16(upper, _mm512_set1_epi32(Lines::kDecade));
      const __m512i compared = kSigned ? _mm512_rol_epi32(bits, 1) : bits;
      const __mmask16 beyond = _mm512_cmpgt_epu32_mask(compared, _mm512_permutexvar_epi32(line, end));
      line = _mm512_mask_add_epi32(line, beyond, line, one);
      const __m512 on_line = _mm512_fmadd_ps(_mm512_castsi512_ps(magnitude), _mm512_permutexvar_ps(line, scale),
                                             _mm512_permutexvar_ps(line, offset));
      const __m512i sum = _mm512_min_epi32(_mm512_cvtps_epi32(on_line), _mm512_permutexvar_epi32(line, last));
      const __mmask16 unsure = _mm512_testn_epi32_mask(sum, _mm512_set1_epi32(Lines::kUnsureMask));
      __m512i code = _mm512_srli_epi32(sum, Lines::kFractionBits);
      const __m512i sign = kSigned ? _mm512_srai_epi32(bits, 31) : _mm512_setzero_si512();  // -1: negative
      if constexpr (kSigned) {                                                              // 127 + code or 127 - code
        code = _mm512_add_epi32(_mm512_xor_si512(code, sign), _mm512_sub_epi32(_mm512_set1_epi32(127), sign));
      }
      if (__builtin_expect(unsure != 0, 0)) {
        const __m512i lower = _mm512_sub_epi32(code, _mm512_add_epi32(sign, one));
        const __m512 bound = _mm512_mask_i32gather_ps(x, unsure, lower, book().bound, 4);
        const __mmask16 above = _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ);
        const __m512i decided = _mm512_mask_add_epi32(lower, above, lower, one);
        code = _mm512_mask_mov_epi32(code, unsure, decided);
      }
      if constexpr (kSigned) code = _mm512_max_epi32(code, _mm512_setzero_si512());  // there is no -1
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
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
