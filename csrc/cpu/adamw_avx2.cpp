// AdamW for AVX2: whole blocks, 8 elements at a time.
#include "adamw.h"
#include "dynamic_codes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "adamw_loops.h"
#include "dynamic_codes_avx2.h"
#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

struct Avx2 : Arithmetic<Avx2Vectors> {
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }

  struct Random {
    __m256i low, high;  // halves of the key, the low ones with the elements' part

    explicit Random(std::uint64_t block_key)
        : low(_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block_key)),
                               _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                                  _mm256_set1_epi32(static_cast<int>(kRandomStride))))),
          high(_mm256_set1_epi32(static_cast<int>(block_key >> 32))) {}

    __m256i bits(std::int64_t i) const {
      const auto offset = static_cast<int>(static_cast<std::uint32_t>(i) * kRandomStride);
      __m256i x = _mm256_add_epi32(low, _mm256_set1_epi32(offset));
      x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
      x = _mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int>(kRandomMix1)));
      x = _mm256_xor_si256(x, high);
      x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
      x = _mm256_mullo_epi32(x, _mm256_set1_epi32(static_cast<int>(kRandomMix2)));
      return _mm256_srli_epi32(x, 16);
    }
  };

  static void round(BFloat16* to, V x, const Random& random, std::int64_t i) {
    const __m256i sum = _mm256_add_epi32(_mm256_castps_si256(x), random.bits(i));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    store_words(to, _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan));
  }

  template <bool kSigned>
  struct Largest {
    __m256i largest;
    Largest() : largest(_mm256_setzero_si256()) {}
    void add(V x) {
      const __m256i bits = _mm256_castps_si256(x);
      largest = _mm256_max_epu32(largest, kSigned ? _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)) : bits);
    }
    std::uint32_t bits() const { return largest_lane(largest); }
  };

  template <bool kSigned>
  using Codes = DynamicCodes<kSigned>;
};

}  // namespace

void adamw_avx2(const AdamwTask& task, std::int64_t begin, std::int64_t end) { update_slice<Avx2>(task, begin, end); }

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
