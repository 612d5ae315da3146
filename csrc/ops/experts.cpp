// experts_4bit, lora_experts_4bit and its gradients: the products of the experts of a mixture, on any device. Their
// matrices [experts, N, K] lie one below the other in one 4-bit weight; each meets its own rows of x, which are sorted
// by expert: those of expert e end at offs[e], as for torch's grouped_mm. Rows behind the last end have results of 0.
//
// is_transposed: matrices are [in, out], the product is x @ W; else they are a linear layer's, and it is x @ W^T. So
// the gradient of x is the other product.
#include <ATen/ops/empty.h>

#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace qlora {
namespace {

using at::Tensor;

// An expert that has rows, with these and its matrix.
struct Expert {
  int64_t index, begin, count;
  Packed4bit w;

  Tensor rows(const Tensor& all) const { return all.narrow(0, begin, count); }
};

class Experts {
 public:
  // The matrices of what has in_features and makes out_features, and rows [*, in_features].
  Experts(const char* op, const Tensor& x, int64_t in_features, int64_t out_features, bool is_transposed,
          const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
          const OptionalTensor& nested_offset, const std::string& quant_type, int64_t blocksize, const Tensor& offs)
      : count_(offs.numel()),
        weight_(op, checked_count(op, {in_features, out_features, count_}), is_transposed ? out_features : in_features,
                packed, absmax, nested_absmax, nested_offset, quant_type, blocksize) {
    const int64_t size = in_features * out_features, blocks = size / blocksize;
    const bool nested = weight_.view.nested_absmax != nullptr, divides = size % blocksize == 0;
    QLORA_CHECK(count_ == 1 || (divides && (!nested || blocks % kNestedBlocksize == 0)), op, "packed",
                nested ? "matrices of whole groups of 256 blocks" : "matrices of whole blocks",
                std::to_string(in_features) + " x " + std::to_string(out_features));
    const Tensor ends = offs.to(at::kCPU, at::kLong).contiguous();
    const auto* end = ends.const_data_ptr<int64_t>();
    int64_t begin = 0;
    for (int64_t i = 0; i < count_; begin = end[i++]) {
      QLORA_CHECK(begin <= end[i] && end[i] <= x.size(0), op, "offs",
                  "ascending ends of at most " + std::to_string(x.size(0)) + " rows",
                  at::IntArrayRef(end, static_cast<size_t>(count_)));
      if (end[i] > begin) with_rows_.push_back({i, begin, end[i] - begin, matrix(i, size, blocks)});
    }
    rows_ = begin;
  }

  int64_t count() const { return count_; }
  auto begin() const { return with_rows_.begin(); }
  auto end() const { return with_rows_.end(); }

  // Results, of which those of no expert are 0.
  Tensor new_results(const Tensor& x, int64_t size) const {
    Tensor results = new_result({x.size(0), size}, x.options());
    results.narrow(0, rows_, x.size(0) - rows_).zero_();
    return results;
  }

 private:
  Packed4bit matrix(int64_t i, int64_t size, int64_t blocks) const {
    Packed4bit w = weight_.view;
    const bool nested = w.nested_absmax != nullptr;
    w.packed += i * size / 2;
    w.absmax = static_cast<const uint8_t*>(w.absmax) + i * blocks * (nested ? 1 : static_cast<int64_t>(sizeof(float)));
    if (nested) w.nested_absmax += i * blocks / kNestedBlocksize;
    return w;
  }

  int64_t count_, rows_ = 0;
  Weight4bit weight_;
  std::vector<Expert> with_rows_;
};

// x[rows, in] of the op.
void check_rows(const char* op, const Tensor& x, const Tensor& packed, const Tensor& offs, int64_t out_features) {
  checked_dtype(op, "x", x.scalar_type());
  QLORA_CHECK(out_features >= 0, op, "out_features", "at least 0", out_features);
  QLORA_CHECK(x.dim() == 2, op, "x", "2 dimensions", x.sizes());
  check_device(op, "packed", packed, x);
  const auto dtype = offs.scalar_type();
  QLORA_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, op, "offs", "dtype int32 or int64", dtype);
  QLORA_CHECK(offs.dim() == 1 && offs.size(0) > 0, op, "offs", "1 dimension, of one end at least", offs.sizes());
  check_device(op, "offs", offs, x);
}

// The product of the expert's rows, with what is added to it.
void multiply_expert(const Expert& expert, bool is_transposed, const Tensor& x, LowRankList added, const Tensor& y) {
  if (is_transposed) {
    multiply_dgrad(expert.rows(x), expert.w, added, expert.rows(y));
  } else {
    multiply(expert.rows(x), expert.w, {}, added, expert.rows(y));
  }
}

Tensor experts_4bit(const Tensor& x_arg, const Tensor& packed, const Tensor& absmax,
                    const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset, std::string quant_type,
                    int64_t blocksize, const Tensor& offs, int64_t out_features, bool is_transposed) {
  constexpr const char* kOp = "experts_4bit";
  const PlainDispatch plain;
  check_rows(kOp, x_arg, packed, offs, out_features);
  const Tensor x = x_arg.contiguous();
  const Experts experts(kOp, x, x.size(1), out_features, is_transposed, packed, absmax, nested_absmax, nested_offset,
                        quant_type, blocksize, offs);
  Tensor y = experts.new_results(x, out_features);
  for (const Expert& expert : experts) multiply_expert(expert, is_transposed, x, {}, y);
  return y;
}

// A[i][experts, r_i, in] and B[i][experts, out, r_i].
void check_expert_adapters(const char* op, int64_t experts, const Tensor& x, int64_t out_features, at::TensorList A,
                           at::TensorList B, c10::ArrayRef<double> scaling) {
  std::vector<Tensor> of_one_A, of_one_B;
  for (const auto& [what, all, of_one] : {std::tuple{"A", &A, &of_one_A}, std::tuple{"B", &B, &of_one_B}}) {
    for (const Tensor& each : *all) {
      QLORA_CHECK(each.dim() == 3 && each.size(0) == experts, op, what,
                  "3 dimensions, the first of " + std::to_string(experts), each.sizes());
      of_one->push_back(each.select(0, 0));
    }
  }
  check_adapters(op, x, out_features, of_one_A, of_one_B, scaling, {}, {});
}

// y of experts_4bit + sum_i scaling_i (x A_i^T) B_i^T; xA: the x A_i^T side by side, in x's dtype.
std::tuple<Tensor, Tensor> lora_experts_4bit(const Tensor& x_arg, const Tensor& packed, const Tensor& absmax,
                                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset,
                                             std::string quant_type, int64_t blocksize, const Tensor& offs,
                                             int64_t out_features, bool is_transposed, at::TensorList A,
                                             at::TensorList B, c10::ArrayRef<double> scaling) {
  constexpr const char* kOp = "lora_experts_4bit";
  const PlainDispatch plain;
  check_rows(kOp, x_arg, packed, offs, out_features);
  const Tensor x = x_arg.contiguous();
  const Experts experts(kOp, x, x.size(1), out_features, is_transposed, packed, absmax, nested_absmax, nested_offset,
                        quant_type, blocksize, offs);
  check_expert_adapters(kOp, experts.count(), x, out_features, A, B, scaling);
  const Device& device = device_for(x);
  const auto dtype = x.scalar_type();
  const auto compute = device.compute_dtype(dtype);
  Tensor y = experts.new_results(x, out_features), xA = experts.new_results(x, total_rank(A));
  for (const Expert& expert : experts) {
    const Tensor of_expert = expert.rows(xA);
    std::vector<LowRank> added;
    int64_t first = 0;
    for (size_t i = 0; i < A.size(); ++i) {
      const Tensor a = A[i].select(0, expert.index), low_rank = of_expert.narrow(1, first, a.size(0));
      low_rank.copy_(device.mm({expert.rows(x), {}}, {a.t(), {}}, 1.0, compute, dtype));
      added.push_back({low_rank, B[i].select(0, expert.index).t(), scaling[i], {}});
      first += a.size(0);
    }
    multiply_expert(expert, is_transposed, x, added, y);
  }
  return {y, xA};
}

// With g_i = scaling_i grad B_i of an expert's rows:  grad_x = its other product of grad + sum_i g_i A_i,
// grad_A_i = g_i^T x  and  grad_B_i = scaling_i grad^T xA_i, in float32 and of the shapes of A_i and B_i. What
// is not wanted of the three is empty. Of x only grad_A needs the values.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_experts_4bit_backward(
    const Tensor& grad_arg, const Tensor& x_arg, const Tensor& xA, const Tensor& packed, const Tensor& absmax,
    const OptionalTensor& nested_absmax, const OptionalTensor& nested_offset, std::string quant_type, int64_t blocksize,
    const Tensor& offs, bool is_transposed, at::TensorList A, at::TensorList B, c10::ArrayRef<double> scaling,
    bool with_grad_x, bool with_grad_A, bool with_grad_B) {
  constexpr const char* kOp = "lora_experts_4bit_backward";
  const PlainDispatch plain;
  check_rows(kOp, x_arg, packed, offs, 0);
  QLORA_CHECK(grad_arg.dim() == 2, kOp, "grad", "2 dimensions", grad_arg.sizes());
  const Tensor x = with_grad_A ? x_arg.contiguous() : x_arg, grad = grad_arg.contiguous();
  const Experts experts(kOp, x, x.size(1), grad.size(1), is_transposed, packed, absmax, nested_absmax, nested_offset,
                        quant_type, blocksize, offs);
  check_expert_adapters(kOp, experts.count(), x, grad.size(1), A, B, scaling);
  for (const auto& [what, tensor, size] :
       {std::tuple{"grad", &grad, grad.size(1)}, std::tuple{"xA", &xA, total_rank(A)}}) {
    QLORA_CHECK_TYPE(tensor->scalar_type() == x.scalar_type(), kOp, what, x.scalar_type(), tensor->scalar_type());
    QLORA_CHECK(tensor->dim() == 2 && tensor->size(0) == x.size(0) && tensor->size(1) == size, kOp, what,
                "shape [" + std::to_string(x.size(0)) + ", " + std::to_string(size) + "]", tensor->sizes());
    check_device(kOp, what, *tensor, x);
  }

  const Device& device = device_for(x);
  const auto compute = device.compute_dtype(x.scalar_type());
  const Tensor grad_x = with_grad_x ? experts.new_results(grad, x.size(1)) : at::empty({0}, grad.options());
  const auto new_gradients = [](bool wanted, at::TensorList factors) {
    std::vector<Tensor> gradients;
    for (size_t i = 0; wanted && i < factors.size(); ++i)
      gradients.push_back(new_result(factors[i].sizes(), factors[i].options().dtype(at::kFloat)));
    return gradients;
  };
  std::vector<Tensor> grad_A = new_gradients(with_grad_A, A), grad_B = new_gradients(with_grad_B, B);
  const auto clear = [&](int64_t begin, int64_t end) {  // the gradients of experts without rows
    for (const auto* gradients : {&grad_A, &grad_B}) {
      for (const Tensor& gradient : *gradients) gradient.narrow(0, begin, end - begin).zero_();
    }
  };
  int64_t cleared = 0;
  for (const Expert& expert : experts) {
    clear(cleared, expert.index);
    cleared = expert.index + 1;
    const Tensor own_x = expert.rows(x), own_grad = expert.rows(grad), own_xA = expert.rows(xA);
    std::vector<LowRank> added;
    for (size_t i = 0; (with_grad_x || with_grad_A) && i < A.size(); ++i) {
      const Tensor b = B[i].select(0, expert.index);
      const Tensor g = device.mm({own_grad, {}}, {b, {}}, scaling[i], compute, at::kFloat);
      added.push_back({g, A[i].select(0, expert.index), 1.0, {}});
    }
    if (with_grad_x) multiply_expert(expert, !is_transposed, grad, added, grad_x);
    int64_t first = 0;
    for (size_t i = 0; i < A.size(); ++i) {
      const Tensor low_rank = own_xA.narrow(1, first, A[i].size(1));
      if (with_grad_A) {
        const Tensor of_A = device.mm({added[i].x.t(), {}}, {own_x, {}}, 1.0, compute, at::kFloat);
        grad_A[i].select(0, expert.index).copy_(of_A);
      }
      if (with_grad_B) {
        const Tensor of_B = device.mm({low_rank.t(), {}}, {own_grad, {}}, scaling[i], compute, at::kFloat);
        grad_B[i].select(0, expert.index).copy_(of_B.t());
      }
      first += A[i].size(1);
    }
  }
  clear(cleared, experts.count());
  return {grad_x, grad_A, grad_B};
}

}  // namespace

void register_expert_ops(torch::Library& m) {
  m.impl("experts_4bit", experts_4bit);
  m.impl("lora_experts_4bit", lora_experts_4bit);
  m.impl("lora_experts_4bit_backward", lora_experts_4bit_backward);
}

}  // namespace qlora
