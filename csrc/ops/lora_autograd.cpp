// The gradients of lora_linear_4bit: for x, the bias and the adapters, never for the 4-bit weight.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd.h"
#include "ops.h"

namespace qlora {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Of adapters; one object, so that autograd takes it for one argument that is no variable.
struct AdapterOptions {
  std::vector<double> scaling, keep;
  OptionalTensor seed;
};

// What the backward pass has of x; no argument of autograd's either.
struct KeptOfX {
  Tensor x;
  bool has_values;
};

std::tuple<Tensor, Tensor> call_lora(const Tensor& x, const WeightArguments& w, c10::SymInt out_features,
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
                                                      const WeightArguments& w, at::TensorList A, at::TensorList B,
                                                      const AdapterOptions& options, bool with_grad_x, bool with_grad_A,
                                                      bool with_grad_B) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("qlora_ext::lora_linear_4bit_backward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
              const OptionalTensor&, std::string, int64_t, at::TensorList, at::TensorList, c10::ArrayRef<double>,
              c10::ArrayRef<double>, const OptionalTensor&, bool, bool, bool)>();
  return op.call(grad, x, xA, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.quant_type, w.blocksize, A, B,
                 options.scaling, options.keep, options.seed, with_grad_x, with_grad_A, with_grad_B);
}

Tensor call_dropout_mask(const Tensor& x, double keep, const Tensor& seed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qlora_ext::dropout_mask", "")
                             .typed<Tensor(const Tensor&, double, const Tensor&)>();
  return op.call(x, keep, seed);
}

// The elements of t[rows, K] that the dropout before adapter i keeps of those rows of x; 0 for the others.
Tensor masked(const AdapterOptions& options, size_t i, const Tensor& rows, const Tensor& t) {
  if (options.keep.empty() || options.keep[i] == 1) return t;
  const Tensor seed = options.seed->reshape({-1})[static_cast<int64_t>(i)];
  return at::where(call_dropout_mask(rows, options.keep[i], seed), t, 0);
}

// One number in the shape of x, whose gradient is x's.
struct WithoutValues : torch::autograd::Function<WithoutValues> {
  static Tensor forward(AutogradContext*, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below;
    return at::empty({}, x.options()).expand_symint(x.sym_sizes());
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return grads; }
};

// Where no A trains, xA as a function of rows of x that are without values.
struct KnownLowRank : torch::autograd::Function<KnownLowRank> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& xA, at::TensorList A,
                        const AdapterOptions& options) {
    variable_list saved = {rows, options.seed.value_or(Tensor())};
    saved.insert(saved.end(), A.begin(), A.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["keep"] = options.keep;
    return xA.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList A = at::TensorList(saved).slice(2);
    const AdapterOptions options{{}, ctx->saved_data.at("keep").toDoubleVector(), saved[1]};
    const Tensor& rows = saved[0];
    Tensor grad_x = at::zeros_symint(rows.sym_sizes(), grads[0].options());
    c10::SymInt rank = 0;
    for (size_t i = 0; i < A.size(); rank += A[i++].sym_size(0)) {
      const Tensor own = grads[0].narrow_symint(1, rank, A[i].sym_size(0));
      grad_x = grad_x + masked(options, i, rows, at::matmul(own, A[i].to(at::kFloat)));
    }
    variable_list out(2 + A.size() + 1);
    out[0] = grad_x.to(rows.scalar_type());
    return out;
  }
};

struct LoraLinear4bit : torch::autograd::Function<LoraLinear4bit> {
  // Of what is saved: after the weight's tensors what is kept of x, and xA, then A and B of all adapters, and the seed
  // of dropout, if any.
  static constexpr size_t kX = WeightArguments::kTensors, kXA = kX + 1, kAdapters = kXA + 1;

  // Returns y. xA is no result of this node: one that saves its own keeps itself alive, where checkpointing ends its
  // second forward pass while it saves.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, at::TensorList A,
                        at::TensorList B, const WeightArguments& w, const c10::SymInt& out_features,
                        const AdapterOptions& options, const KeptOfX& kept, Tensor* xA) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor y;
    std::tie(y, *xA) = call_lora(x, w, out_features, bias, A, B, options);
    variable_list saved = w.save(ctx);
    saved.insert(saved.end(), {kept.x, *xA});
    saved.insert(saved.end(), A.begin(), A.end());
    saved.insert(saved.end(), B.begin(), B.end());
    if (options.seed.has_value()) saved.push_back(*options.seed);
    ctx->saved_data["scaling"] = options.scaling;
    ctx->saved_data["keep"] = options.keep;
    ctx->saved_data["trains_A"] = kept.has_values;
    save_bias(ctx, bias);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const WeightArguments w = WeightArguments::saved(ctx, saved);
    AdapterOptions options{
        ctx->saved_data.at("scaling").toDoubleVector(), ctx->saved_data.at("keep").toDoubleVector(), {}};
    const auto& [scaling, keep, seed] = options;
    const size_t count = scaling.size();
    const at::TensorList A = at::TensorList(saved).slice(kAdapters, count);
    const at::TensorList B = at::TensorList(saved).slice(kAdapters + count, count);
    if (!keep.empty()) options.seed = saved.at(kAdapters + 2 * count);
    const Tensor &x = saved[kX], &xA = saved[kXA];
    const Tensor& grad_y = grads[0];
    const size_t first_B = 2 + count;  // of the gradients, in the order of forward's arguments: x, bias, A, B, ...
    variable_list out(2 + 2 * count + 5);
    if (!grad_y.defined()) return out;
    TORCH_CHECK(!grad_y._fw_grad(0).defined(), "lora_linear_4bit: tangents of gradients: expected none, got one");
    const bool wants_x = ctx->needs_input_grad(0);
    out[1] = bias_grad(ctx, grad_y);

    if (at::GradMode::is_enabled()) {  // create_graph: by products that can be differentiated again, in float32
      const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
      const bool trains_A = ctx->saved_data.at("trains_A").toBool();
      const Tensor rows = as_rows(x), grad = as_rows(grad_y).to(at::kFloat);
      Tensor grad_x = wants_x ? call_dgrad(grad, w, x.sym_size(-1)) : Tensor();
      const Tensor known = trains_A ? Tensor() : KnownLowRank::apply(rows, xA, A, options);
      c10::SymInt rank = 0;
      for (size_t i = 0; i < count; rank += A[i++].sym_size(0)) {
        const Tensor a = A[i].to(at::kFloat),
                     own_x = trains_A ? masked(options, i, rows, rows.to(at::kFloat)) : Tensor();
        const Tensor g = at::matmul(grad * scaling[i], B[i].to(at::kFloat));
        if (wants_x) grad_x = grad_x + masked(options, i, rows, at::matmul(g, a));
        if (trains_A) out[2 + i] = at::matmul(g.t(), own_x).to(A[i].scalar_type());
        const Tensor low_rank = trains_A ? at::matmul(own_x, a.t()) : known.narrow_symint(1, rank, A[i].sym_size(0));
        out[first_B + i] = at::matmul(grad.t() * scaling[i], low_rank).to(B[i].scalar_type());
      }
      if (wants_x) out[0] = grad_x.to(x.scalar_type()).view_as(x);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      const size_t first = has_bias(ctx) ? 2 : 1;
      const bool wants_A = ctx->needs_input_grad({{first, first + count}}),
                 wants_B = ctx->needs_input_grad({{first + count, first + 2 * count}});
      const auto [grad_x, grad_A, grad_B] =
          call_lora_backward(grad_y, x, xA, w, A, B, options, wants_x, wants_A, wants_B);
      if (wants_x) out[0] = grad_x;
      int64_t rank = 0;
      for (size_t i = 0; i < count; rank += A[i++].size(0)) {
        const int64_t r = A[i].size(0);
        if (wants_A) out[2 + i] = grad_A.narrow(0, rank, r).to(A[i].scalar_type());
        if (wants_B) out[first_B + i] = grad_B.narrow(0, rank, r).t().contiguous().to(B[i].scalar_type());
      }
    }
    return out;
  }
};

std::tuple<Tensor, Tensor> lora_linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                            const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                            std::string quant_type, int64_t blocksize, c10::SymInt out_features,
                                            const OptionalTensor& bias, at::TensorList A, at::TensorList B,
                                            c10::ArrayRef<double> scaling, c10::ArrayRef<double> keep,
                                            const OptionalTensor& seed) {
  const AdapterOptions options{scaling.vec(), keep.vec(), seed};
  const WeightArguments w{packed, absmax, nested_absmax, nested_offset, quant_type, blocksize};
  if (!is_recorded({x, bias.value_or(Tensor()), A, B})) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_lora(x, w, out_features, bias, A, B, options);
  }
  // x's values are for the gradient of A alone, and most of what a training step keeps: they go where no A trains
  // (LoRA-FA, arXiv 2308.03303).
  const bool trains_A = std::any_of(A.begin(), A.end(), [](const Tensor& a) { return a.requires_grad(); });
  const KeptOfX kept{trains_A ? x : WithoutValues::apply(x), trains_A};
  Tensor xA;
  const Tensor y = LoraLinear4bit::apply(x, bias, A, B, w, out_features, options, kept, &xA);
  return {y, xA};
}

}  // namespace
}  // namespace qlora

TORCH_LIBRARY_IMPL(qlora_ext, Autograd, m) { m.impl("lora_linear_4bit", qlora::lora_linear_4bit); }
