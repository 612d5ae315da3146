// The gradients of the products: for x, the bias and the adapters, never for the 4-bit weight.
//
// In C++, not by torch.library.register_autograd: that walks the tensor lists in Python, which took a tenth of a
// training step of a small model (bench/NOTES.md).
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace qlora {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The 4-bit weight of an op's arguments, as it stands in the schemas.
struct Weight {
  Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_offset;
  std::string quant_type;
  int64_t blocksize;

  static constexpr size_t kTensors = 4;  // of what save() returns

  static Weight saved(const AutogradContext* ctx, const variable_list& tensors) {
    auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    return {tensors[0],
            tensors[1],
            optional(tensors[2]),
            optional(tensors[3]),
            ctx->saved_data.at("quant_type").toStringRef(),
            ctx->saved_data.at("blocksize").toInt()};
  }

  // Its tensors, the first of what is saved for the backward pass.
  variable_list save(AutogradContext* ctx) const {
    ctx->saved_data["quant_type"] = quant_type;
    ctx->saved_data["blocksize"] = blocksize;
    return {packed, absmax, nested_absmax.value_or(Tensor()), nested_offset.value_or(Tensor())};
  }
};

// Of adapters; one object, so that autograd takes it for one argument that is no variable.
struct AdapterOptions {
  std::vector<double> scaling, keep;
  OptionalTensor seed;
};

Tensor call_linear(const Tensor& x, const Weight& w, c10::SymInt out_features, const OptionalTensor& bias) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("qlora_ext::linear_4bit", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                        std::string, int64_t, c10::SymInt, const OptionalTensor&)>();
  return op.call(x, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.quant_type, w.blocksize,
                 std::move(out_features), bias);
}

Tensor call_dgrad(const Tensor& grad, const Weight& w, c10::SymInt in_features) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qlora_ext::linear_4bit_dgrad", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                           const OptionalTensor&, std::string, int64_t, c10::SymInt)>();
  return op.call(grad, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.quant_type, w.blocksize,
                 std::move(in_features));
}

std::tuple<Tensor, Tensor> call_lora(const Tensor& x, const Weight& w, c10::SymInt out_features,
                                     const OptionalTensor& bias, at::TensorList A, at::TensorList B,
                                     const AdapterOptions& options) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("qlora_ext::lora_linear_4bit", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, std::string, int64_t, c10::SymInt,
                                            const OptionalTensor&, at::TensorList, at::TensorList,
                                            c10::ArrayRef<double>, c10::ArrayRef<double>, const OptionalTensor&)>();
  return op.call(x, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.quant_type, w.blocksize,
                 std::move(out_features), bias, A, B, options.scaling, options.keep, options.seed);
}

std::tuple<Tensor, Tensor, Tensor> call_lora_backward(const Tensor& grad, const Tensor& x, const Tensor& xA,
                                                      const Weight& w, at::TensorList A, at::TensorList B,
                                                      const AdapterOptions& options, bool with_grad_x) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("qlora_ext::lora_linear_4bit_backward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
              const OptionalTensor&, std::string, int64_t, at::TensorList, at::TensorList, c10::ArrayRef<double>,
              c10::ArrayRef<double>, const OptionalTensor&, bool)>();
  return op.call(grad, x, xA, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.quant_type, w.blocksize, A, B,
                 options.scaling, options.keep, options.seed, with_grad_x);
}

Tensor call_dropout_mask(const Tensor& x, double keep, const Tensor& seed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qlora_ext::dropout_mask", "")
                             .typed<Tensor(const Tensor&, double, const Tensor&)>();
  return op.call(x, keep, seed);
}

void save_bias(AutogradContext* ctx, const OptionalTensor& bias) {
  if (bias.has_value()) ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias->scalar_type());
}

// Undefined if no one asks for it. needs_input_grad counts the tensors that there are: without a bias, the second is
// another, or there is none.
Tensor bias_grad(const AutogradContext* ctx, const Tensor& grad) {
  const auto dtype = ctx->saved_data.find("bias_dtype");
  if (dtype == ctx->saved_data.end() || !ctx->needs_input_grad(1)) return {};
  const Tensor sum = at::sum(as_rows(grad), at::IntArrayRef{0}, false, at::kFloat);
  return sum.to(static_cast<at::ScalarType>(dtype->second.toInt()));
}

struct Linear4bit : torch::autograd::Function<Linear4bit> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, const Weight& w,
                        const c10::SymInt& out_features) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor y = call_linear(x, w, out_features, bias);  // first, for its checks
    ctx->saved_data["in_features"] = x.sym_size(-1);
    save_bias(ctx, bias);
    ctx->save_for_backward(w.save(ctx));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Weight w = Weight::saved(ctx, ctx->get_saved_variables());
    variable_list out(4);
    if (ctx->needs_input_grad(0)) out[0] = call_dgrad(grads[0], w, ctx->saved_data.at("in_features").toSymInt());
    out[1] = bias_grad(ctx, grads[0]);
    return out;
  }
};

// x @ W has x @ W^T for its gradient.
struct Linear4bitDgrad : torch::autograd::Function<Linear4bitDgrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Weight& w, const c10::SymInt& in_features) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor grad_x = call_dgrad(grad, w, in_features);  // first, for its checks
    ctx->saved_data["out_features"] = grad.sym_size(-1);
    ctx->save_for_backward(w.save(ctx));
    return grad_x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Weight w = Weight::saved(ctx, ctx->get_saved_variables());
    return {call_linear(grads[0], w, ctx->saved_data.at("out_features").toSymInt(), std::nullopt), {}, {}};
  }
};

struct LoraLinear4bit : torch::autograd::Function<LoraLinear4bit> {
  // Of what is saved: after the weight's tensors x and xA, then A and B of all adapters, and the seed of dropout, if
  // any.
  static constexpr size_t kX = Weight::kTensors, kXA = kX + 1, kAdapters = kXA + 1;

  // Returns y. xA is no second output: it would have to be marked as not differentiable, and compiled autograd takes no
  // function that marks one.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, at::TensorList A,
                        at::TensorList B, const Weight& w, const c10::SymInt& out_features,
                        const AdapterOptions& options, Tensor* xA) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor y;
    std::tie(y, *xA) = call_lora(x, w, out_features, bias, A, B, options);
    variable_list saved = w.save(ctx);
    saved.insert(saved.end(), {x, *xA});
    saved.insert(saved.end(), A.begin(), A.end());
    saved.insert(saved.end(), B.begin(), B.end());
    if (options.seed.has_value()) saved.push_back(*options.seed);
    ctx->saved_data["scaling"] = options.scaling;
    ctx->saved_data["keep"] = options.keep;
    save_bias(ctx, bias);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Weight w = Weight::saved(ctx, saved);
    AdapterOptions options{
        ctx->saved_data.at("scaling").toDoubleVector(), ctx->saved_data.at("keep").toDoubleVector(), {}};
    const auto& [scaling, keep, seed] = options;
    const size_t count = scaling.size();
    const at::TensorList A = at::TensorList(saved).slice(kAdapters, count);
    const at::TensorList B = at::TensorList(saved).slice(kAdapters + count, count);
    if (!keep.empty()) options.seed = saved.at(kAdapters + 2 * count);
    const size_t first_B = 2 + count;  // of the gradients, in the order of forward's arguments: x, bias, A, B, ...
    variable_list out(2 + 2 * count + 4);
    if (!grads[0].defined()) return out;

    TORCH_CHECK(!grads[0]._fw_grad(0).defined(), "lora_linear_4bit: tangents of gradients: expected none, got one");
    out[1] = bias_grad(ctx, grads[0]);
    if (at::GradMode::is_enabled()) {  // create_graph: by products that can be differentiated again, in float32
      const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
      const Tensor grad = as_rows(grads[0]).to(at::kFloat);
      Tensor grad_x = ctx->needs_input_grad(0) ? call_dgrad(grad, w, saved[kX].sym_size(-1)) : Tensor();
      for (size_t i = 0; i < count; ++i) {
        const Tensor rows = as_rows(saved[kX]);
        const bool drops = !keep.empty() && keep[i] != 1;
        const Tensor mask =
            drops ? call_dropout_mask(rows, keep[i], seed->reshape({-1})[static_cast<int64_t>(i)]) : Tensor();
        auto masked = [&](const Tensor& t) { return drops ? at::where(mask, t, 0) : t; };
        const Tensor x = masked(rows.to(at::kFloat));
        const Tensor a = A[i].to(at::kFloat), g = at::matmul(grad * scaling[i], B[i].to(at::kFloat));
        if (grad_x.defined()) grad_x = grad_x + masked(at::matmul(g, a));
        out[2 + i] = at::matmul(g.t(), x).to(A[i].scalar_type());
        out[first_B + i] = at::matmul(grad.t() * scaling[i], at::matmul(x, a.t())).to(B[i].scalar_type());
      }
      if (grad_x.defined()) out[0] = grad_x.to(saved[kX].scalar_type()).view_as(saved[kX]);
      return out;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [grad_x, grad_A, grad_B] =
        call_lora_backward(grads[0], saved[kX], saved[kXA], w, A, B, options, ctx->needs_input_grad(0));
    if (ctx->needs_input_grad(0)) out[0] = grad_x;
    int64_t first = 0;
    for (size_t i = 0; i < count; ++i) {
      const int64_t r = A[i].size(0);
      out[2 + i] = grad_A.narrow(0, first, r).to(A[i].scalar_type());
      out[first_B + i] = grad_B.narrow(0, first, r).t().contiguous().to(B[i].scalar_type());
      first += r;
    }
    return out;
  }
};

// Whether autograd has to see an op on these tensors. A node made for nothing costs as much as a small layer's product
// of one row. (Tangents go to the node, too: it says that there is no forward mode.)
bool is_recorded(std::initializer_list<at::TensorList> lists) {
  return std::any_of(lists.begin(), lists.end(), [](at::TensorList tensors) {
    return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
      return t.defined() && ((at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined());
    });
  });
}

Tensor linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                   const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize,
                   c10::SymInt out_features, const OptionalTensor& bias) {
  const Weight w{packed, absmax, nested_absmax, nested_offset, quant_type, blocksize};
  if (!is_recorded({x, bias.value_or(Tensor())})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_linear(x, w, out_features, bias);
  }
  return Linear4bit::apply(x, bias, w, out_features);
}

Tensor linear_4bit_dgrad(const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                         std::string quant_type, int64_t blocksize, c10::SymInt in_features) {
  const Weight w{packed, absmax, nested_absmax, nested_offset, quant_type, blocksize};
  if (!is_recorded({grad})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_dgrad(grad, w, in_features);
  }
  return Linear4bitDgrad::apply(grad, w, in_features);
}

std::tuple<Tensor, Tensor> lora_linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                            std::string quant_type, int64_t blocksize, c10::SymInt out_features,
                                            const OptionalTensor& bias, at::TensorList A, at::TensorList B,
                                            c10::ArrayRef<double> scaling, c10::ArrayRef<double> keep,
                                            const OptionalTensor& seed) {
  const AdapterOptions options{scaling.vec(), keep.vec(), seed};
  const Weight w{packed, absmax, nested_absmax, nested_offset, quant_type, blocksize};
  if (!is_recorded({x, bias.value_or(Tensor()), A, B})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_lora(x, w, out_features, bias, A, B, options);
  }
  Tensor xA;
  const Tensor y = LoraLinear4bit::apply(x, bias, A, B, w, out_features, options, &xA);
  return {y, xA};
}

}  // namespace
}  // namespace qlora

TORCH_LIBRARY_IMPL(qlora_ext, Autograd, m) {
  m.impl("linear_4bit", qlora::linear_4bit);
  m.impl("linear_4bit_dgrad", qlora::linear_4bit_dgrad);
  m.impl("lora_linear_4bit", qlora::lora_linear_4bit);
}
