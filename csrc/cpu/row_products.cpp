// row_products: the choice of its kernel.
#include "row_products.h"

#include <stdexcept>

#include "path.h"

namespace qlora::cpu {

void row_products(const RowProducts& product, std::int64_t begin, std::int64_t end) {
  if (product.M > kMostRowProducts) throw std::logic_error("row_products: more rows than kMostRowProducts");
#if defined(__x86_64__)
  if (path() >= Path::Avx512Bf16 && product.compute == DType::BFloat16) {
    return row_products_avx512_bf16(product, begin, end);
  }
  if (path() >= Path::Avx512) return row_products_avx512(product, begin, end);
  if (path() == Path::Avx2) return row_products_avx2(product, begin, end);
#endif
  row_products_portable(product, begin, end);
}

}  // namespace qlora::cpu
