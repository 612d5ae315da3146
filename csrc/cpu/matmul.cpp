// matmul: the choice of its kernel, and its memory.
#include "matmul.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "matmul_blocks.h"
#include "path.h"

namespace qlora::cpu {
namespace {

using Kernel = void (*)(const Matmul&, const Rectangle&, const MatmulScratch&);

// Null where there is none.
Kernel kernel_for([[maybe_unused]] DType compute) {
#if defined(__x86_64__)
  switch (path()) {
    case Path::Portable:
      break;
    case Path::Avx2:
      return matmul_avx2;
    case Path::Avx512Bf16:
      if (compute == DType::BFloat16) return multiplies_matrices() ? nullptr : matmul_avx512_bf16;
      [[fallthrough]];
    case Path::Avx512:
      return matmul_avx512;
  }
#endif
  return nullptr;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

bool has_matmul(DType compute) { return kernel_for(compute) != nullptr; }

void matmul(const Matmul& product, const Rectangle& rectangle) {
  const Kernel kernel = kernel_for(product.compute);
  if (kernel == nullptr) throw std::logic_error("matmul: no kernel that computes in this dtype on this CPU path");
  const auto is_border = [&](std::int64_t column) { return column % kMatmulColumnBorder == 0 || column == product.J; };
  if (!is_border(rectangle.column_begin) || !is_border(rectangle.column_end)) {
    throw std::logic_error("matmul: columns must be cut at multiples of kMatmulColumnBorder");
  }
  constexpr std::size_t kAlignment = 64;
  constexpr std::size_t kBytes = MatmulScratch::kFloats * sizeof(float);
  static_assert(kBytes % kAlignment == 0);
  const std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(kAlignment, kBytes)));
  if (memory == nullptr) throw std::bad_alloc();
  kernel(product, rectangle, MatmulScratch(memory.get()));
}

}  // namespace qlora::cpu
