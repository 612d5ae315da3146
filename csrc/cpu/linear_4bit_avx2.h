// What linear_4bit's AVX2 kernels, forward and dgrad, share: which of a chunk's absmax a lane takes, and the loops. A
// file of kernels includes this inside its target region.
#include "linear_4bit_loops.h"
#include "simd_avx2.h"

namespace qlora::cpu {
namespace {

// Of a chunk of 64 weights, the upper 4 lanes have the second half.
struct LanesAvx2 {
  __m256i of_pair;  // in the upper lanes 1 if their absmax is the next one, 0 if it is the same

  explicit LanesAvx2(std::int64_t blocksize)
      : of_pair(_mm256_set_m128i(_mm_set1_epi32(static_cast<int>(kRun / blocksize)), _mm_setzero_si128())) {}

  __m256 scales(const float* absmax) const {
    double pair;
    __builtin_memcpy(&pair, absmax, sizeof pair);
    return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(pair)), of_pair);
  }

  __m256 scales(const float* absmax, std::int64_t) const {  // of the one run that can be left
    return _mm256_set_m128(_mm_setzero_ps(), _mm_set1_ps(absmax[0]));
  }
};

}  // namespace
}  // namespace qlora::cpu
