// What the gradients of linear_4bit and of lora_linear_4bit share.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>
#include <string>

#include "check.h"

namespace qlora {

// The 4-bit weight of an op's arguments, as it stands in the schemas.
struct WeightArguments {
  at::Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_offset;
  std::string quant_type;
  int64_t blocksize;

  static constexpr size_t kTensors = 4;  // of what save() returns

  static WeightArguments saved(const torch::autograd::AutogradContext* ctx,
                               const torch::autograd::variable_list& tensors);
  // Its tensors, the first of what is saved for the backward pass.
  torch::autograd::variable_list save(torch::autograd::AutogradContext* ctx) const;
};

at::Tensor call_dgrad(const at::Tensor& grad, const WeightArguments& w, c10::SymInt in_features);

void save_bias(torch::autograd::AutogradContext* ctx, const OptionalTensor& bias);
// Whether there was one. needs_input_grad counts the tensors that there are: with a bias, it is the second.
bool has_bias(const torch::autograd::AutogradContext* ctx);
// Undefined if no one asks for it.
at::Tensor bias_grad(const torch::autograd::AutogradContext* ctx, const at::Tensor& grad);

// Whether autograd has to see an op on these tensors. A node made for nothing costs as much as a small layer's product
// of one row. (Tangents go to the node, too: it says that there is no forward mode.)
bool is_recorded(std::initializer_list<at::TensorList> lists);

}  // namespace qlora
