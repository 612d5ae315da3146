// Which gradients PagedAdamW takes as they are, told for all parameters at once: in Python it takes a microsecond for
// each.
#include <ATen/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

namespace py = pybind11;

namespace qlora {
namespace {

using at::Tensor;

// Not of a class of its own, which may give another shape or gradient than is seen here.
bool has_plain_type(py::handle object) { return THPVariable_CheckTypeExact(Py_TYPE(object.ptr())); }

bool is_plain(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return tensor.layout() == at::kStrided && (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16);
}

// Whether one number may be several elements of it.
bool may_overlap(const Tensor& tensor) {
  return !tensor.is_contiguous() && std::ranges::count(tensor.strides(), 0) > 0;
}

py::object plain_gradient(py::handle object) {
  if (!has_plain_type(object)) return py::none();
  const Tensor& param = THPVariable_Unpack(object.ptr());
  const Tensor& grad = param.unsafeGetTensorImpl()->grad();  // Tensor::grad() would warn of one that is no leaf
  const bool plain =
      grad.defined() && is_plain(param) && is_plain(grad) && grad.sizes() == param.sizes() && !may_overlap(param);
  py::object given = plain ? py::cast(grad) : py::none();
  return plain && has_plain_type(given) ? given : py::none();
}

}  // namespace

// The gradient of each; None where there is none or one of both needs a closer look.
py::list plain_gradients(const py::list& params) {
  py::list gradients;
  for (const py::handle param : params) gradients.append(plain_gradient(param));
  return gradients;
}

}  // namespace qlora
