// Which elements dropout keeps, on the CPU.
#pragma once

#include <cstdint>

namespace qlora::cpu {

// Blocks [begin, end) of 256 of kept[n]: each element is kept with probability kept_below / 2^32. The bytes depend on
// the key, not on how the blocks are split nor on the path.
void dropout_mask(std::uint64_t key, std::uint32_t kept_below, std::int64_t n, std::int64_t begin, std::int64_t end,
                  bool* kept);

}  // namespace qlora::cpu
