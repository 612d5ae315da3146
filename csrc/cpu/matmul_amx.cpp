// matmul for AMX: tiles of 32 rows x 32 columns, as 2 x 2 of the machine's, whose sums go to memory after each block.
#include "matmul_blocks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "amx.h"
#include "matmul_avx512_bf16.h"

namespace qlora::cpu {
namespace {

struct Amx : PairsAvx512<Amx> {
  static constexpr std::int64_t kSide = amx::kRows;  // of a tile of sums, and pairs of a row of x
  static constexpr std::int64_t kRowBoundary = 2 * kSide, kDepthStep = kSide;
  static constexpr std::int64_t kMostOfPanel = 1 << 20;  // half of the L2 that CPUs with AMX have
  static constexpr int kTileRows = 2 * kSide, kRowStep = kSide;
  static constexpr bool kRowsApart = true;
  using State = amx::Tiles;

  // Rows beyond an unfinished depth have an absmax of 0, as stage_absmax leaves it.
  static void fill_weight(QuantType quant_type, const MatmulScratch& s, std::int64_t column, std::int64_t depth) {
    PairsAvx512::fill_weight(quant_type, s, column, steps_of<Amx>(depth) * kPerStep);
  }

  // Tiles 0 to 3 are sums, 4 and 5 of x, 6 and 7 of the panel.
  template <int kRows>
  [[gnu::noinline]] static void multiply_tile(const float* x, const float* panel, std::int64_t steps, float* sums) {
    constexpr std::int64_t kStride = kSumStride * sizeof(float), kPanelStride = kColumns * sizeof(float);
    constexpr bool kBoth = kRows == kTileRows;
    float* const below = sums + kSide * kSumStride;
    amx::load<0>(sums, kStride);
    amx::load<1>(sums + kSide, kStride);
    if constexpr (kBoth) {
      amx::load<2>(below, kStride);
      amx::load<3>(below + kSide, kStride);
    }
    const float *x_below = x + kSide * steps, *const end = x_below;
    for (; x < end; x += kSide * kSide, x_below += kSide * kSide, panel += kSide * kColumns) {
      amx::load<4>(x, amx::kRowBytes);
      amx::load<6>(panel, kPanelStride);
      amx::load<7>(panel + kSide, kPanelStride);
      amx::multiply_add<0, 4, 6>();
      amx::multiply_add<1, 4, 7>();
      if constexpr (kBoth) {
        amx::load<5>(x_below, amx::kRowBytes);
        amx::multiply_add<2, 5, 6>();
        amx::multiply_add<3, 5, 7>();
      }
    }
    amx::store<0>(sums, kStride);
    amx::store<1>(sums + kSide, kStride);
    if constexpr (kBoth) {
      amx::store<2>(below, kStride);
      amx::store<3>(below + kSide, kStride);
    }
  }
};

}  // namespace

const MatmulKernel matmul_amx = kMatmulKernel<Amx>;

}  // namespace qlora::cpu

#pragma GCC pop_options
#endif
