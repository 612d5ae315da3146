// Which gradients PagedAdamW takes as they are, told for all parameters at once: in Python it takes a microsecond for
// each.
#include <ATen/Tensor.h>

#include <algorithm>
#include <vector>

namespace qlora {
namespace {

using at::Tensor;

bool is_plain(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return tensor.layout() == at::kStrided && (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) &&
         !tensor.unsafeGetTensorImpl()->is_python_dispatch();
}

// Whether one number may be several elements of it.
bool may_overlap(const Tensor& tensor) {
  return !tensor.is_contiguous() && std::ranges::count(tensor.strides(), 0) > 0;
}

}  // namespace

// The gradient of each; undefined where there is none or one of both needs a closer look.
std::vector<Tensor> plain_gradients(const std::vector<Tensor>& params) {
  std::vector<Tensor> gradients;
  for (const Tensor& param : params) {
    const Tensor& grad = param.grad();
    const bool plain =
        grad.defined() && is_plain(param) && is_plain(grad) && grad.sizes() == param.sizes() && !may_overlap(param);
    gradients.push_back(plain ? grad : Tensor());
  }
  return gradients;
}

}  // namespace qlora
