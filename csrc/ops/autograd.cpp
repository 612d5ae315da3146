// The gradients of linear_4bit and linear_4bit_dgrad: for x and the bias, never for the 4-bit weight.
//
// In C++, not by torch.library.register_autograd: that walks the tensor lists in Python, which took a tenth of a
// training step of a small model (bench/NOTES.md).
#include <ATen/TensorOperators.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "autograd.h"
#include "ops.h"

namespace qlora {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

WeightArguments WeightArguments::saved(const AutogradContext* ctx, const variable_list& tensors) {
  auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  return {tensors[0],
          tensors[1],
          optional(tensors[2]),
          optional(tensors[3]),
          ctx->saved_data.at("quant_type").toStringRef(),
          ctx->saved_data.at("blocksize").toInt()};
}

variable_list WeightArguments::save(AutogradContext* ctx) const {
  ctx->saved_data["quant_type"] = quant_type;
  ctx->saved_data["blocksize"] = blocksize;
  return {packed, absmax, nested_absmax.value_or(Tensor()), nested_offset.value_or(Tensor())};
}

Tensor call_dgrad(const Tensor& grad, const WeightArguments& w, c10::SymInt in_features) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qlora_ext::linear_4bit_dgrad", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                           const OptionalTensor&, std::string, int64_t, c10::SymInt)>();
  return op.call(grad, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.quant_type, w.blocksize,
                 std::move(in_features));
}

void save_bias(AutogradContext* ctx, const OptionalTensor& bias) {
  if (bias.has_value()) ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
}

bool has_bias(const AutogradContext* ctx) { return ctx->saved_data.find("bias_dtype") != ctx->saved_data.end(); }

Tensor bias_grad(const AutogradContext* ctx, const Tensor& grad) {
  if (!has_bias(ctx) || !ctx->needs_input_grad(1)) return {};
  const Tensor sum = at::sum(as_rows(grad), at::IntArrayRef{0}, false, at::kFloat);
  return sum.to(static_cast<at::ScalarType>(ctx->saved_data.at("bias_dtype").toInt()));
}

bool is_recorded(std::initializer_list<at::TensorList> lists) {
  return std::any_of(lists.begin(), lists.end(), [](at::TensorList tensors) {
    return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
      return t.defined() && ((at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined());
    });
  });
}

namespace {

Tensor call_linear(const Tensor& x, const WeightArguments& w, c10::SymInt out_features, const OptionalTensor& bias) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("qlora_ext::linear_4bit", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                        std::string, int64_t, c10::SymInt, const OptionalTensor&)>();
  return op.call(x, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.quant_type, w.blocksize,
                 std::move(out_features), bias);
}

struct Linear4bit : torch::autograd::Function<Linear4bit> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, const WeightArguments& w,
                        const c10::SymInt& out_features) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor y = call_linear(x, w, out_features, bias);  // first, for its checks
    ctx->saved_data["in_features"] = x.sym_size(-1);
    save_bias(ctx, bias);
    ctx->save_for_backward(w.save(ctx));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const WeightArguments w = WeightArguments::saved(ctx, ctx->get_saved_variables());
    variable_list out(4);
    if (ctx->needs_input_grad(0)) out[0] = call_dgrad(grads[0], w, ctx->saved_data.at("in_features").toSymInt());
    out[1] = bias_grad(ctx, grads[0]);
    return out;
  }
};

// x @ W has x @ W^T for its gradient.
struct Linear4bitDgrad : torch::autograd::Function<Linear4bitDgrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const WeightArguments& w,
                        const c10::SymInt& in_features) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor grad_x = call_dgrad(grad, w, in_features);  // first, for its checks
    ctx->saved_data["out_features"] = grad.sym_size(-1);
    ctx->save_for_backward(w.save(ctx));
    return grad_x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const WeightArguments w = WeightArguments::saved(ctx, ctx->get_saved_variables());
    return {call_linear(grads[0], w, ctx->saved_data.at("out_features").toSymInt(), std::nullopt), {}, {}};
  }
};

Tensor linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                   const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize,
                   c10::SymInt out_features, const OptionalTensor& bias) {
  const WeightArguments w{packed, absmax, nested_absmax, nested_offset, quant_type, blocksize};
  if (!is_recorded({x, bias.value_or(Tensor())})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_linear(x, w, out_features, bias);
  }
  return Linear4bit::apply(x, bias, w, out_features);
}

Tensor linear_4bit_dgrad(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                         std::string quant_type, int64_t blocksize, c10::SymInt in_features) {
  const WeightArguments w{packed, absmax, nested_absmax, nested_offset, quant_type, blocksize};
  if (!is_recorded({grad})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_dgrad(grad, w, in_features);
  }
  return Linear4bitDgrad::apply(grad, w, in_features);
}

}  // namespace
}  // namespace qlora

TORCH_LIBRARY_IMPL(qlora_ext, Autograd, m) {
  m.impl("linear_4bit", qlora::linear_4bit);
  m.impl("linear_4bit_dgrad", qlora::linear_4bit_dgrad);
}
