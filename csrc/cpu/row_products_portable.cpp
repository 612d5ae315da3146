// row_products for any machine.
#include "row_products.h"
#include "row_products_loops.h"
#include "simd_portable.h"

namespace qlora::cpu {
namespace {

struct Portable : PortableVectors {
  static constexpr int kPerStep = 1, kRows = 4;

  using Mask = Bits;  // all bits of a lane

  static Mask mask(const bool* from, std::int64_t count = kLanes) {
    Mask mask{};
    for (std::int64_t i = 0; i < count; ++i) mask[i] = 0u - from[i];
    return mask;
  }
  static Vector keep(Vector x, Mask mask) { return floats(bits(x) & mask); }

  static Vector product(Vector a, Vector b, Vector sum) { return multiply_add(a, b, sum); }
};

}  // namespace

void row_products_portable(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  multiply_any<Portable>(product, begin, end);
}

}  // namespace qlora::cpu
