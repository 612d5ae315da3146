// matmul for AVX512, in fp32.
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "matmul_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 : Avx512Tiles<Avx512> {
  // Rounding errors of longer chains would grow beyond those of torch's kernels.
  static constexpr std::int64_t kChain = 64;
  static constexpr std::int64_t kPerStep = 1;

  template <typename T>
  static Vector places(const T* from) {
    return load16(from);
  }

  static Vector product(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }

  static void store_rows(__m512 even, __m512 odd, std::int64_t r, float* panel) {
    _mm512_storeu_ps(panel + r * kColumns, even);
    _mm512_storeu_ps(panel + (r + 1) * kColumns, odd);
  }

  static void fill_weight(QuantType quant_type, const MatmulScratch& s, std::int64_t column, std::int64_t depth) {
    const __m512 table = _mm512_loadu_ps(codebook(quant_type).value);
    for (std::int64_t half = 0; half < kColumns; half += 16) {
      const float* absmax = s.absmax + (column + half) / kStep * kDepth;
      const std::uint8_t* packed = s.packed + (column + half) / 2;
      for (std::int64_t r = 0; r < depth; ++r, packed += kStagedBytes) {
        const __m512 codes = _mm512_permutexvar_ps(indices(packed), table);
        _mm512_storeu_ps(s.panel + r * kColumns + half, _mm512_mul_ps(codes, _mm512_set1_ps(absmax[r])));
      }
    }
  }
};

}  // namespace

const MatmulKernel matmul_avx512 = kMatmulKernel<Avx512>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
