// What the two kinds of matmul share on AVX512. A file of kernels includes this inside its target region.
#include "matmul_loops.h"
#include "simd_avx512.h"
#include "transpose_bytes.h"

namespace qlora::cpu {
namespace {

struct Avx512Tiles {
  static constexpr std::int64_t kColumns = 32, kLanes = 16;
  static constexpr int kTileRows = 12;
  using Vector = __m512;

  static void transpose(Vector (&x)[kLanes]) { cpu::transpose(x); }

  static void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
  static void store_first(float* to, Vector x, std::int64_t lanes) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << lanes) - 1), x);
  }

  template <typename T>
  static void store_row(const float* sums, const T* bias, std::int64_t columns, T* out) {
    std::int64_t j = 0;
    for (; j + 16 <= columns; j += 16) {
      const __m512 sum = _mm512_loadu_ps(sums + j);
      store16(out + j, bias == nullptr ? sum : _mm512_add_ps(sum, load16(bias + j)));
    }
    for (; j < columns; ++j) out[j] = round_to<T>(bias == nullptr ? sums[j] : sums[j] + to_float(bias[j]));
  }
};

}  // namespace
}  // namespace qlora::cpu
