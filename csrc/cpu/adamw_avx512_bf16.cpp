// AdamW for AVX512 with BF16 and VBMI: whole blocks.
#include "adamw.h"
#include "dynamic_codes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")

#include "dynamic_lookup_avx512_vbmi.h"

#include "adamw_avx512.h"

namespace qlora::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  using Avx512::store;

  // By one instruction, in place of store16's eight, but for subnormals and NaN: it rounds those in another way.
  static void store(BFloat16* to, V x) {
    constexpr int kQuietNan = 0x01, kSubnormal = 0x20, kSignalingNan = 0x80;
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, kQuietNan | kSubnormal | kSignalingNan) != 0, 0)) {
      return store16(to, x);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

}  // namespace

void adamw_avx512_bf16(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  update_slice<Avx512Bf16>(task, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
