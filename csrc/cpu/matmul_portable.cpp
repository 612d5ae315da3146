// matmul for any machine, in fp32: tiles of 12 rows x 8 columns, 24 sums in Arm's 32 registers.
#include "matmul_blocks.h"

#ifdef QLORA_EXT_PORTABLE_MATMUL
#include "matmul_loops.h"
#include "simd_portable.h"

namespace qlora::cpu {
namespace {

struct Portable : PortableVectors, VectorTiles {
  static constexpr std::int64_t kColumns = 2 * kLanes;
  static constexpr std::int64_t kChain = 64;  // as for AVX2
  static constexpr std::int64_t kPerStep = 1;
  static constexpr int kTileRows = 12;

  template <typename T>
  static Vector places(const T* from) {
    return load(from);
  }

  static void store_first(float* to, Vector x, std::int64_t lanes) {
    for (std::int64_t i = 0; i < lanes; ++i) to[i] = x[i];
  }

  template <typename T>
  static void store_panel_rows(const T* even, const T* odd, std::int64_t r, float* panel) {
    float* to = panel + r * kColumns;
    for (std::int64_t j = 0; j < kColumns; j += kLanes) {
      store(to + j, load(even + j));
      store(to + kColumns + j, load(odd + j));
    }
  }

  // 4 of W's rows at a time, a byte of each: what is even goes to one of the panel's rows, what is odd to the next.
  static void fill_weight_transposed(QuantType quant_type, const MatmulScratch& s, std::int64_t depth) {
    const CodePairs& pairs = code_pairs(quant_type);
    for (std::int64_t j = 0; j < kColumns; j += kLanes) {
      const std::uint8_t* const rows = s.packed + j * kStagedBytes;
      for (std::int64_t r = 0; r < depth; r += 2) {
        const std::uint8_t* byte = rows + r / 2;
        const Vector first = pairs(byte[0], byte[kStagedBytes]);
        const Vector second = pairs(byte[2 * kStagedBytes], byte[3 * kStagedBytes]);
        const Vector scale = load(s.absmax + r / kStep * kDepth + j);
        float* to = s.panel + r * kColumns + j;
        store(to, Vector{first[0], first[2], second[0], second[2]} * scale);
        store(to + kColumns, Vector{first[1], first[3], second[1], second[3]} * scale);
      }
    }
  }

  static void fill_weight(QuantType quant_type, const MatmulScratch& s, std::int64_t column, std::int64_t depth) {
    const CodePairs& pairs = code_pairs(quant_type);
    for (std::int64_t r = 0; r < depth; ++r) {
      const std::uint8_t* bytes = s.packed + r * kStagedBytes + column / 2;
      const float absmax = s.absmax[column / kStep * kDepth + r];
      for (std::int64_t j = 0; j < kColumns; j += kLanes) {
        store(s.panel + r * kColumns + j, pairs(bytes[j / 2], bytes[j / 2 + 1]) * absmax);
      }
    }
  }

  template <int kRows>
  [[gnu::noinline]] static void multiply_tile(const float* x, const float* panel, std::int64_t steps, float* sums) {
    Vector sum[kRows][2] = {};
    for (std::int64_t step = 0; step < steps; ++step, x += kRows, panel += kColumns) {
      const Vector left = load(panel), right = load(panel + kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        sum[i][0] = multiply_add(splat(x[i]), left, sum[i][0]);
        sum[i][1] = multiply_add(splat(x[i]), right, sum[i][1]);
      }
    }
    for (int i = 0; i < kRows; ++i, sums += kColumns) {
      for (int q = 0; q < 2; ++q) store(sums + q * kLanes, load(sums + q * kLanes) + sum[i][q]);
    }
  }
};

}  // namespace

const MatmulKernel matmul_portable = kMatmulKernel<Portable>;

}  // namespace qlora::cpu

#endif
