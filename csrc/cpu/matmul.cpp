// matmul: the choice of its kernel, and its memory.
#include "matmul.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "matmul_blocks.h"
#include "path.h"

namespace qlora::cpu {
namespace {

using Kernel = void (*)(const Matmul&, const Rectangle&, const MatmulScratch&);

// Null where there is none.
Kernel kernel_for([[maybe_unused]] DType dtype) {
#if defined(__x86_64__)
  switch (path()) {
    case Path::Portable:
      return nullptr;
    case Path::Avx2:
      return matmul_avx2;
    case Path::Avx512:
    case Path::Avx512Bf16:
      return matmul_avx2;
  }
#endif
  return nullptr;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

bool has_matmul(DType dtype) { return kernel_for(dtype) != nullptr; }

void matmul(const Matmul& product, const Rectangle& rectangle) {
  const Kernel kernel = kernel_for(product.dtype);
  if (kernel == nullptr) throw std::logic_error("matmul: no kernel for this dtype on this CPU path");
  constexpr std::size_t kAlignment = 64;
  constexpr std::size_t kBytes = MatmulScratch::kFloats * sizeof(float);
  static_assert(kBytes % kAlignment == 0);
  const std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(kAlignment, kBytes)));
  if (memory == nullptr) throw std::bad_alloc();
  kernel(product, rectangle, MatmulScratch(memory.get()));
}

}  // namespace qlora::cpu
