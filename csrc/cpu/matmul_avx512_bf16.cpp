// matmul for AVX512_BF16.
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "matmul_avx512_bf16.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 : PairsAvx512<Avx512Bf16> {
  static Vector product(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(b), (__m512bh)_mm512_castps_si512(a));
  }
};

}  // namespace

const MatmulKernel matmul_avx512_bf16 = kMatmulKernel<Avx512Bf16>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
