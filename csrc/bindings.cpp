// The pybind11 module qlora_ext._C: importing it loads the ops; it shows the codebooks, the CPU path
// and the paged optimizer's states to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "codebook.h"
#include "cpu/path.h"

namespace qlora {
void bind_paged_adamw(pybind11::module_& m);  // ops_paged_adamw.cpp
}

namespace {

std::vector<float> codebook(const std::string& name) {
  using qlora::QuantType;
  if (name == "nf4" || name == "fp4") {
    const auto& values = qlora::codebook(name == "nf4" ? QuantType::NF4 : QuantType::FP4).value;
    return {std::begin(values), std::end(values)};
  }
  if (name == "dynamic") {
    return {std::begin(qlora::kDynamicCodebook.value), std::end(qlora::kDynamicCodebook.value)};
  }
  throw std::invalid_argument("codebook: name: expected 'nf4', 'fp4' or 'dynamic', got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  qlora::cpu::path();  // an unusable QLORA_EXT_CPU fails here, at import, with its reason
  m.def("codebook", &codebook, "The values of a codebook, by code: 'nf4' and 'fp4' (16), 'dynamic' (256, absmax).");
  m.def("cpu_path", [] { return qlora::cpu::path_name(qlora::cpu::path()); }, "The CPU path in use.");
  m.def("cpu_paths", &qlora::cpu::path_names, "The CPU paths this machine can run, ascending.");
  m.def("set_cpu_path", &qlora::cpu::set_path, "Use this CPU path from now on; ValueError if it cannot run.");
  qlora::bind_paged_adamw(m);
#ifdef QLORA_EXT_NVCC  // its version and architectures, from setup.py
  m.attr("compiler") = __VERSION__ ", " QLORA_EXT_NVCC;
#else
  m.attr("compiler") = __VERSION__;
#endif
}
