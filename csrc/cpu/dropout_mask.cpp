// dropout_mask: which numbers are kept, by a hash of the seed and their index.
#include "dropout_mask.h"

#include <cstring>

#include "../integers.h"
#include "../random.h"
#include "path.h"

namespace qlora::cpu {
namespace {

// Whole blocks. The loop is the compiler's to vectorize, once for each instruction set.
[[gnu::always_inline]] inline void fill(std::uint64_t key, std::uint32_t kept_below, std::int64_t begin,
                                        std::int64_t end, bool* kept) {
  for (std::int64_t block = begin; block < end; ++block, kept += kRandomBlock) {
    const std::uint64_t block_key = random_block_key(key, block);
    for (std::uint32_t i = 0; i < kRandomBlock; ++i) kept[i] = random32(block_key, i) < kept_below;
  }
}

void fill_portable(std::uint64_t key, std::uint32_t kept_below, std::int64_t begin, std::int64_t end, bool* kept) {
  fill(key, kept_below, begin, end, kept);
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
void fill_avx2(std::uint64_t key, std::uint32_t kept_below, std::int64_t begin, std::int64_t end, bool* kept) {
  fill(key, kept_below, begin, end, kept);
}
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
void fill_avx512(std::uint64_t key, std::uint32_t kept_below, std::int64_t begin, std::int64_t end, bool* kept) {
  fill(key, kept_below, begin, end, kept);
}
#pragma GCC pop_options
#endif

}  // namespace

void dropout_mask(std::uint64_t key, std::uint32_t kept_below, std::int64_t n, std::int64_t begin, std::int64_t end,
                  bool* kept) {
  auto kernel = fill_portable;
#if defined(__x86_64__)
  if (path() == Path::Avx2) kernel = fill_avx2;
  if (path() >= Path::Avx512) kernel = fill_avx512;
#endif
  const std::int64_t whole = smaller(end, n / kRandomBlock);
  kernel(key, kept_below, begin, whole, kept + begin * kRandomBlock);
  if (whole < end) {
    bool last[kRandomBlock];
    kernel(key, kept_below, whole, whole + 1, last);
    std::memcpy(kept + whole * kRandomBlock, last, static_cast<std::size_t>(n % kRandomBlock));
  }
}

}  // namespace qlora::cpu
