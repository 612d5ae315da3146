// row_products for AVX512.
#include "row_products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "row_products_loops.h"
#include "simd_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 : Avx512Vectors {
  static constexpr int kPerStep = 1, kRows = 8;

  using Mask = __mmask16;

  static Mask true_bytes(__m128i bytes) { return _mm_cmpneq_epi8_mask(bytes, _mm_setzero_si128()); }
  static Mask mask(const bool* from) { return true_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static Mask mask(const bool* from, std::int64_t count) {
    return true_bytes(_mm512_castsi512_si128(load_bytes(from, count)));
  }
  static Vector keep(Vector x, Mask mask) { return _mm512_maskz_mov_ps(mask, x); }

  static Vector product(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
};

}  // namespace

void row_products_avx512(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Avx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
