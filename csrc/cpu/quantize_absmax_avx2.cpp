// quantize_absmax for AVX2: whole groups.
#include "dynamic_codes.h"
#include "quantize.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "dynamic_codes_avx2.h"
#include "quantize_absmax_loops.h"

namespace qlora::cpu {

void quantize_absmax_avx2(const float* absmax, float offset, std::int64_t begin, std::int64_t end, std::uint8_t* codes,
                          float* nested_absmax) {
  quantize_groups<DynamicCodes<true>>(absmax, offset, begin, end, codes, nested_absmax);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
