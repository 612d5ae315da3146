// adamw_step: the update of AdamW for whole tensors, without pages.
#include <tuple>

#include "ops.h"

namespace qlora {
namespace {

using at::Tensor;
using at::TensorList;
constexpr const char* kOp = "adamw_step";

void check_count(const char* what, TensorList list, size_t count) {
  QLORA_CHECK(list.size() == count, kOp, what, std::to_string(count) + " tensors, as in params", list.size());
}

// A contiguous tensor of so many elements beside `like`.
void check_tensor(const char* what, const Tensor& tensor, const Tensor& like, int64_t numel) {
  check_device(kOp, what, tensor, like);
  QLORA_CHECK(tensor.numel() == numel, kOp, what, std::to_string(numel) + " elements", tensor.numel());
  QLORA_CHECK(tensor.is_contiguous(), kOp, what, "a contiguous tensor", "strides " + c10::str(tensor.strides()));
}

void check_state(const char* what, const Tensor& tensor, const Tensor& like, int64_t numel, at::ScalarType dtype) {
  QLORA_CHECK_TYPE(tensor.scalar_type() == dtype, kOp, what, "dtype " + c10::str(dtype), tensor.scalar_type());
  check_tensor(what, tensor, like, numel);
}

const float* checked_scalar(const char* what, const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  check_state(what, *tensor, like, 1, at::kFloat);
  return tensor->const_data_ptr<float>();
}

}  // namespace

void adamw_step(TensorList params, TensorList grads, TensorList exp_avg, TensorList exp_avg_sq,
                TensorList exp_avg_absmax, TensorList exp_avg_sq_absmax, const AdamwHyper& hyper,
                const OptionalTensor& grad_scale, const OptionalTensor& found_inf, std::optional<uint64_t> seed) {
  const bool is_8bit = !exp_avg_absmax.empty();
  for (const auto& [what, list] :
       {std::tuple{"grads", grads}, std::tuple{"exp_avg", exp_avg}, std::tuple{"exp_avg_sq", exp_avg_sq}}) {
    check_count(what, list, params.size());
  }
  if (is_8bit) check_count("exp_avg_absmax", exp_avg_absmax, params.size());
  check_count("exp_avg_sq_absmax", exp_avg_sq_absmax, is_8bit ? params.size() : 0);
  QLORA_CHECK(hyper.step >= 1, kOp, "step", "at least 1", hyper.step);
  if (params.empty()) return;
  std::vector<AdamwSlice> slices(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const int64_t count = param.numel();
    const auto state = is_8bit ? at::kByte : at::kFloat;
    check_tensor("params", param, params[0], count);
    check_tensor("grads", grads[i], param, count);
    check_state("exp_avg", exp_avg[i], param, count, state);
    check_state("exp_avg_sq", exp_avg_sq[i], param, count, state);
    slices[i] = {.param = param.data_ptr(),
                 .grad = grads[i].const_data_ptr(),
                 .param_dtype = checked_dtype(kOp, "params", param.scalar_type()),
                 .grad_dtype = checked_dtype(kOp, "grads", grads[i].scalar_type()),
                 .count = count,
                 .first = 0,
                 .index = i,
                 .exp_avg = exp_avg[i].data_ptr(),
                 .exp_avg_sq = exp_avg_sq[i].data_ptr(),
                 .exp_avg_absmax = nullptr,
                 .exp_avg_sq_absmax = nullptr,
                 .hyper = &hyper};
    if (!is_8bit) continue;
    const int64_t blocks = ceil_div(count, kAdamwBlock);
    check_state("exp_avg_absmax", exp_avg_absmax[i], param, blocks, at::kFloat);
    check_state("exp_avg_sq_absmax", exp_avg_sq_absmax[i], param, blocks, at::kFloat);
    slices[i].exp_avg_absmax = exp_avg_absmax[i].data_ptr<float>();
    slices[i].exp_avg_sq_absmax = exp_avg_sq_absmax[i].data_ptr<float>();
  }
  const AdamwOptions options{.grad_scale = checked_scalar("grad_scale", grad_scale, params[0]),
                             .found_inf = checked_scalar("found_inf", found_inf, params[0]),
                             .stochastic_rounding = seed.has_value(),
                             .seed = seed.value_or(0)};
  device_for(params[0]).adamw(slices.data(), static_cast<int64_t>(slices.size()), options, params[0]);
}

}  // namespace qlora
