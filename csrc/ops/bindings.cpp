// The pybind11 module qlora_ext._C: importing it loads the ops; it shows the codebooks, the CPU path, the update of
// AdamW and the paged optimizer's states to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../codebook.h"
#include "../cpu/path.h"
#include "ops.h"

namespace qlora {
void bind_paged_adamw(pybind11::module_& m);                   // paged_adamw.cpp
pybind11::list plain_gradients(const pybind11::list& params);  // plain_gradients.cpp
}  // namespace qlora

namespace {

namespace py = pybind11;

std::vector<float> codebook(const std::string& name) {
  using qlora::QuantType;
  if (name == "nf4" || name == "fp4") {
    const auto& values = qlora::codebook(name == "nf4" ? QuantType::NF4 : QuantType::FP4).value;
    return {std::begin(values), std::end(values)};
  }
  if (name == "dynamic") {
    return {std::begin(qlora::kDynamicCodebook.value), std::end(qlora::kDynamicCodebook.value)};
  }
  if (name == "dynamic_unsigned") {
    return {std::begin(qlora::kUnsignedCodebook.value), std::end(qlora::kUnsignedCodebook.value)};
  }
  throw std::invalid_argument("codebook: name: expected 'nf4', 'fp4', 'dynamic' or 'dynamic_unsigned', got '" + name +
                              "'");
}

using Tensors = std::vector<at::Tensor>;

void adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq,
                const Tensors& exp_avg_absmax, const Tensors& exp_avg_sq_absmax, double lr, double beta1, double beta2,
                double eps, double weight_decay, int64_t step, bool maximize, const qlora::OptionalTensor& grad_scale,
                const qlora::OptionalTensor& found_inf, std::optional<uint64_t> seed) {
  const py::gil_scoped_release release;
  qlora::adamw_step(params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax,
                    {lr, beta1, beta2, eps, weight_decay, step, maximize}, grad_scale, found_inf, seed);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  qlora::cpu::path();  // an unusable QLORA_EXT_CPU fails here, at import, with its reason
  m.def("codebook", &codebook,
        "The values of a codebook, by code: 'nf4' and 'fp4' (16), 'dynamic' and 'dynamic_unsigned' (256).");
  m.def("adamw_step", &adamw_step, "AdamW for whole tensors, in place.", py::arg("params"), py::arg("grads"),
        py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("exp_avg_absmax"), py::arg("exp_avg_sq_absmax"),
        py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
        py::arg("step"), py::arg("maximize") = false, py::arg("grad_scale") = py::none(),
        py::arg("found_inf") = py::none(), py::arg("seed") = py::none());
  m.def("cpu_path", [] { return qlora::cpu::path_name(qlora::cpu::path()); }, "The CPU path in use.");
  m.def("cpu_paths", &qlora::cpu::path_names, "The CPU paths this machine can run, ascending.");
  m.def("set_cpu_path", &qlora::cpu::set_path,
        "Use this CPU path from now on, and not while an op runs; ValueError if it cannot run.");
  qlora::bind_paged_adamw(m);
  m.def("plain_gradients", &qlora::plain_gradients,
        "The gradient of each parameter, or None where there is none or one of both needs a closer look.");
  m.attr("ADAMW_BLOCK") = qlora::kAdamwBlock;
  m.attr("NESTED_BLOCKSIZE") = qlora::kNestedBlocksize;
#ifdef QLORA_EXT_NVCC  // its version and architectures, from setup.py
  m.attr("compiler") = __VERSION__ ", " QLORA_EXT_NVCC;
#else
  m.attr("compiler") = __VERSION__;
#endif
}
