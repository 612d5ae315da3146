// row_products for AVX512.
#include "row_products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "row_products_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512 : Avx512Vectors {
  static constexpr int kPerStep = 1;

  static Vector product(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
};

}  // namespace

void row_products_avx512(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Avx512>(product, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
