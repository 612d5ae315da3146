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
      break;
    case Path::Avx2:
      return matmul_avx2;
    case Path::Avx512Bf16:
      if (dtype == DType::BFloat16) return multiplies_matrices() ? nullptr : matmul_avx512_bf16;
      [[fallthrough]];
    case Path::Avx512:
      return matmul_avx512;
  }
#endif
  return nullptr;
}

// What the product is computed in: bf16 where an operand is, fp32 otherwise.
DType multiplied_as(const Matmul& product) {
  for (int t = 0; t < product.num_terms; ++t) {
    const Term& term = product.terms[t];
    const bool dense = term.kind == Term::Kind::Dense;
    if (term.x.dtype == DType::BFloat16 || (dense && term.dense.dtype == DType::BFloat16)) return DType::BFloat16;
  }
  return DType::Float32;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

bool has_matmul(DType operands) { return kernel_for(operands) != nullptr; }

void matmul(const Matmul& product, const Rectangle& rectangle) {
  const Kernel kernel = kernel_for(multiplied_as(product));
  if (kernel == nullptr) throw std::logic_error("matmul: no kernel for this dtype on this CPU path");
  constexpr std::size_t kAlignment = 64;
  constexpr std::size_t kBytes = MatmulScratch::kFloats * sizeof(float);
  static_assert(kBytes % kAlignment == 0);
  const std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(kAlignment, kBytes)));
  if (memory == nullptr) throw std::bad_alloc();
  kernel(product, rectangle, MatmulScratch(memory.get()));
}

}  // namespace qlora::cpu
