// The tiles of csrc/cpu/amx.h in plain C++, for the kernels that are built for any x86-64 (cmake/emulated.cmake).
#pragma once

#include <cstring>
#include <stdexcept>

#include "codec.h"

namespace qlora::cpu::amx {

struct Configuration {
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct State {
  bool configured = false;
  Configuration configuration;
  unsigned char tile[8][16][64];
};

inline State& state() {
  thread_local State state;
  return state;
}

inline State& configured() {
  if (!state().configured) throw std::logic_error("a tile is used without a configuration");
  return state();
}

template <int kTile>
void clear() {
  std::memset(configured().tile[kTile], 0, sizeof State().tile[kTile]);
}

template <int kTile>
void load(const void* from, std::int64_t stride) {
  clear<kTile>();
  const Configuration& c = state().configuration;
  for (int row = 0; row < c.rows[kTile]; ++row) {
    std::memcpy(state().tile[kTile][row], static_cast<const char*>(from) + row * stride, c.row_bytes[kTile]);
  }
}

template <int kTile>
void store(void* to, std::int64_t stride) {
  const Configuration& c = configured().configuration;
  for (int row = 0; row < c.rows[kTile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, state().tile[kTile][row], c.row_bytes[kTile]);
  }
}

// The shapes must agree: the machine would raise SIGILL.
template <int kSums, int kA, int kB>
void multiply_add() {
  const Configuration& c = configured().configuration;
  if (c.row_bytes[kSums] != c.row_bytes[kB] || c.rows[kSums] != c.rows[kA] || c.row_bytes[kA] != 4 * c.rows[kB]) {
    throw std::logic_error("tiles of other shapes than their sums");
  }
  const auto at = [](int tile, int row, int bf16) {
    BFloat16 value;
    std::memcpy(&value, state().tile[tile][row] + 2 * bf16, sizeof value);
    return to_float(value);
  };
  for (int i = 0; i < c.rows[kSums]; ++i) {
    for (int j = 0; j < c.row_bytes[kSums] / 4; ++j) {
      float sum;
      std::memcpy(&sum, state().tile[kSums][i] + 4 * j, sizeof sum);
      for (int pair = 0; pair < c.rows[kB]; ++pair) {
        for (int k = 0; k < 2; ++k) sum += at(kA, i, 2 * pair + k) * at(kB, pair, 2 * j + k);
      }
      std::memcpy(state().tile[kSums][i] + 4 * j, &sum, sizeof sum);
    }
  }
}

class Tiles {
 public:
  explicit Tiles(const Configuration& configuration = {}) {
    state().configured = true;
    state().configuration = configuration;
  }
  ~Tiles() { state().configured = false; }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace qlora::cpu::amx
