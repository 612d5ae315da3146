// AdamW on the CPU. What is computed: csrc/adamw.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../adamw.h"

namespace qlora::cpu {

// Blocks [begin, end) of the n slices, counted through all of them. Holds no threads: the caller splits
// [0, adamw_blocks) as it likes.
void adamw(const AdamwSlice* slices, std::int64_t n, const AdamwOptions& options, std::int64_t begin, std::int64_t end);

// --- the kernels --------------------------------------------------------------------------------------------------

// The update of one slice.
struct AdamwTask {
  const AdamwSlice* slice;
  AdamwFactors factors;  // with the scale of the gradients
  bool stochastic_rounding;
  std::uint64_t key;  // adamw_key
};

// Blocks [begin, end) of the slice, all of them whole.
void adamw_portable(const AdamwTask& task, std::int64_t begin, std::int64_t end);
void adamw_avx2(const AdamwTask& task, std::int64_t begin, std::int64_t end);
void adamw_avx512(const AdamwTask& task, std::int64_t begin, std::int64_t end);
void adamw_avx512_bf16(const AdamwTask& task, std::int64_t begin, std::int64_t end);

}  // namespace qlora::cpu
