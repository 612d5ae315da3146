// AdamW for AVX512 (F, BW, DQ, VL), 16 elements at a time. A file of kernels includes this inside its target region,
// after dynamic_lookup_avx512.h or its twin for VBMI.
#include "adamw_loops.h"
#include "dynamic_codes_avx512.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 : Arithmetic<Avx512Vectors> {
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }

  struct Random {
    __m512i low, high;  // halves of the key, the low ones with the elements' part

    explicit Random(std::uint64_t block_key)
        : low(_mm512_add_epi32(
              _mm512_set1_epi32(static_cast<int>(block_key)),
              _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                 _mm512_set1_epi32(static_cast<int>(kRandomStride))))),
          high(_mm512_set1_epi32(static_cast<int>(block_key >> 32))) {}

    __m512i bits(std::int64_t i) const {
      const auto offset = static_cast<int>(static_cast<std::uint32_t>(i) * kRandomStride);
      __m512i x = _mm512_add_epi32(low, _mm512_set1_epi32(offset));
      x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
      x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(kRandomMix1)));
      x = _mm512_xor_si512(x, high);
      x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
      x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(kRandomMix2)));
      return _mm512_srli_epi32(x, 16);
    }
  };

  static void round(BFloat16* to, V x, const Random& random, std::int64_t i) {
    const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(x), random.bits(i));
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                                  _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
  }

  template <bool kSigned>
  struct Largest {
    __m512i largest;
    Largest() : largest(_mm512_setzero_si512()) {}
    void add(V x) {
      const __m512i bits = _mm512_castps_si512(x);
      largest = _mm512_max_epu32(largest, kSigned ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)) : bits);
    }
    std::uint32_t bits() const { return _mm512_reduce_max_epu32(largest); }
  };

  template <bool kSigned>
  using Codes = DynamicCodes<kSigned>;
};

}  // namespace
}  // namespace qlora::cpu
