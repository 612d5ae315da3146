// AdamW for AVX512 (F, BW, DQ, VL): whole blocks.
#include "adamw.h"
#include "dynamic_codes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "dynamic_lookup_avx512.h"

#include "adamw_avx512.h"

namespace qlora::cpu {

void adamw_avx512(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  update_slice<Avx512>(task, begin, end);
}

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
