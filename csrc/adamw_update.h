// The update of AdamW, written once for numbers and vectors: the moments, then the parameter. A file of vector kernels
// includes this inside its target region.
//
// Math has V and its operations, each rounded to nearest on its own: splat, multiply, add, subtract, divide, sqrt.
#include "adamw.h"  // a file of kernels has it before its target region: nothing is compiled here

namespace qlora {
namespace {

// g: multiplied by f.gradient already.
template <typename Math, typename V>
QLORA_HOST_DEVICE inline void adamw_moments(const AdamwFactors& f, V g, V& m, V& v) {
  const V change = Math::multiply(Math::subtract(g, m), Math::splat(f.average));
  m = Math::add(f.from_gradient ? g : m, change);
  const V square = Math::multiply(Math::multiply(g, Math::splat(f.square)), g);
  v = Math::add(Math::multiply(v, Math::splat(f.beta2)), square);
}

template <typename Math, typename V>
QLORA_HOST_DEVICE inline void adamw_parameter(const AdamwFactors& f, V m, V v, V& p) {
  p = Math::multiply(p, Math::splat(f.decay));
  const V denominator = Math::add(Math::sqrt(v), Math::splat(f.eps));
  p = Math::subtract(p, Math::divide(Math::multiply(m, Math::splat(f.step_size)), denominator));
}

template <typename Math, typename V>
QLORA_HOST_DEVICE inline void adamw_update(const AdamwFactors& f, V g, V& p, V& m, V& v) {
  adamw_moments<Math>(f, Math::multiply(g, Math::splat(f.gradient)), m, v);
  adamw_parameter<Math>(f, m, v, p);
}

}  // namespace
}  // namespace qlora
