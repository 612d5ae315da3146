// The instructions of AMX: tiles of 16 rows of 64 bytes, eight of them for a thread while it holds Tiles. Names of
// tiles are numbers in the code of an instruction, hence template arguments.
#pragma once

#include <cstdint>

namespace qlora::cpu::amx {

constexpr std::int64_t kRows = 16, kRowBytes = 64, kTileBytes = kRows * kRowBytes;

}  // namespace qlora::cpu::amx

#if defined(QLORA_EXT_EMULATED)
#include "emulated_tiles.h"
#else

namespace qlora::cpu::amx {

// Of 16 rows, from `from` on, so many bytes apart. (GCC's own intrinsics do not tell the compiler that they read.)
template <int kTile>
inline void load(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// sums[i][j] += of all pairs p: a[i][p] . b[p][j], in fp32; subnormals count as 0.
template <int kSums, int kA, int kB>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Given back at the end: a thread that has none is switched from faster.
class Tiles {
 public:
  explicit Tiles(const Configuration& configuration = {}) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace qlora::cpu::amx

#endif
