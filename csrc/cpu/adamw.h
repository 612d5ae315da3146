// What the files of AdamW's CPU kernels share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../adamw.h"

namespace qlora::cpu {

// The update of one slice.
struct AdamwTask {
  const AdamwSlice* slice;
  AdamwFactors factors;  // with the scale of the gradients
  bool stochastic_rounding;
  std::uint64_t key;  // adamw_key
};

// The vector twins of the portable code: blocks [begin, end) of the slice, all of them whole.
void adamw_avx2(const AdamwTask& task, std::int64_t begin, std::int64_t end);
void adamw_avx512(const AdamwTask& task, std::int64_t begin, std::int64_t end);
void adamw_avx512_bf16(const AdamwTask& task, std::int64_t begin, std::int64_t end);

}  // namespace qlora::cpu
