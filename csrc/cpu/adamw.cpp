// AdamW: the choice of the kernel, and a slice's last, shorter block.
#include "adamw.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "path.h"

namespace qlora::cpu {
namespace {

using Kernel = decltype(adamw_portable);

// The last, shorter block of an array of a slice, and behind it its elements once more.
struct LastBlock {
  std::byte* const from;
  const std::size_t bytes;
  alignas(64) std::byte block[kAdamwBlock * sizeof(float)];

  LastBlock(void* array, std::int64_t count, std::int64_t itemsize)
      : from(static_cast<std::byte*>(array) + count / kAdamwBlock * kAdamwBlock * itemsize),
        bytes(static_cast<std::size_t>(count) % kAdamwBlock * static_cast<std::size_t>(itemsize)) {
    std::memcpy(block, from, bytes);
    for (std::size_t at = bytes; at < sizeof block; at *= 2) {
      std::memcpy(block + at, block, std::min(at, sizeof block - at));
    }
  }
  void put_back() const { std::memcpy(from, block, bytes); }
};

void update_last(Kernel* kernel, const AdamwTask& task) {
  AdamwSlice slice = *task.slice;
  const std::int64_t whole = slice.count / kAdamwBlock, state = slice.exp_avg_absmax == nullptr ? 4 : 1;
  LastBlock param(slice.param, slice.count, itemsize(slice.param_dtype));
  LastBlock grad(const_cast<void*>(slice.grad), slice.count, itemsize(slice.grad_dtype));
  LastBlock exp_avg(slice.exp_avg, slice.count, state), exp_avg_sq(slice.exp_avg_sq, slice.count, state);
  slice.param = param.block, slice.grad = grad.block;
  slice.exp_avg = exp_avg.block, slice.exp_avg_sq = exp_avg_sq.block;
  slice.first += whole * kAdamwBlock, slice.count = kAdamwBlock;
  if (state == 1) slice.exp_avg_absmax += whole, slice.exp_avg_sq_absmax += whole;
  kernel({&slice, task.factors, task.stochastic_rounding, task.key}, 0, 1);
  for (const LastBlock* each : {&param, &exp_avg, &exp_avg_sq}) each->put_back();
}

void update(const AdamwTask& task, std::int64_t begin, std::int64_t end) {
  Kernel* kernel = adamw_portable;
#if defined(__x86_64__)
  const Path chosen = path();
  if (chosen == Path::Avx2) kernel = adamw_avx2;
  if (chosen == Path::Avx512) kernel = adamw_avx512;
  if (chosen >= Path::Avx512Bf16) kernel = adamw_avx512_bf16;
#endif
  const std::int64_t whole = std::max(begin, std::min(end, task.slice->count / kAdamwBlock));
  kernel(task, begin, whole);
  if (whole < end) update_last(kernel, task);
}

}  // namespace

void adamw(const AdamwSlice* slices, std::int64_t n, const AdamwOptions& options, std::int64_t begin,
           std::int64_t end) {
  if (options.found_inf != nullptr && *options.found_inf != 0.0f) return;
  std::int64_t first = 0;  // block of the slice, counted through all
  for (std::int64_t i = 0; i < n && first < end; ++i) {
    const AdamwSlice& slice = slices[i];
    const std::int64_t blocks = adamw_blocks(slice);
    if (begin < first + blocks) {
      AdamwTask task{&slice, adamw_factors(*slice.hyper), options.stochastic_rounding, adamw_key(slice, options.seed)};
      if (options.grad_scale != nullptr) task.factors.gradient *= 1.0f / *options.grad_scale;
      update(task, std::max<std::int64_t>(begin - first, 0), std::min(end - first, blocks));
    }
    first += blocks;
  }
}

}  // namespace qlora::cpu
