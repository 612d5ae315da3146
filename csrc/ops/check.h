// The argument checks of the ops: each is written once, so that every message names the op, the argument, what was
// expected and what was got. QLORA_CHECK raises ValueError, QLORA_CHECK_TYPE TypeError.
#pragma once

#include <ATen/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "../codec.h"

#define QLORA_CHECK(cond, op, what, expected, got) \
  TORCH_CHECK_VALUE(cond, op, ": ", what, ": expected ", expected, ", got ", got)
#define QLORA_CHECK_TYPE(cond, op, what, expected, got) \
  TORCH_CHECK_TYPE(cond, op, ": ", what, ": expected ", expected, ", got ", got)

namespace qlora {

using OptionalTensor = std::optional<at::Tensor>;

// Of a dtype that has been checked.
inline DType dtype_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? DType::Float32 : dtype == at::kHalf ? DType::Float16 : DType::BFloat16;
}

inline DType checked_dtype(const char* op, const char* what, at::ScalarType dtype) {
  QLORA_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, what,
                   "dtype float32, float16 or bfloat16", dtype);
  return dtype_of(dtype);
}

inline void check_device(const char* op, const char* what, const at::Tensor& tensor, const at::Tensor& like) {
  QLORA_CHECK(tensor.device() == like.device(), op, what, "device " + like.device().str(), tensor.device().str());
}

inline QuantType checked_quant_type(const char* op, const std::string& quant_type) {
  QLORA_CHECK(quant_type == "nf4" || quant_type == "fp4", op, "quant_type", "'nf4' or 'fp4'", "'" + quant_type + "'");
  return quant_type == "nf4" ? QuantType::NF4 : QuantType::FP4;
}

inline void check_blocksize(const char* op, int64_t blocksize) {
  const bool power_of_two = blocksize > 0 && (blocksize & (blocksize - 1)) == 0;
  QLORA_CHECK(power_of_two && blocksize >= kMinBlocksize && blocksize <= kMaxBlocksize, op, "blocksize",
              "a power of two from 32 to 4096", blocksize);
}

// How many elements a weight of these sizes has.
inline int64_t checked_count(const char* op, at::IntArrayRef sizes) {
  int64_t count = 1;
  bool overflows = false;
  for (const int64_t size : sizes) overflows |= c10::mul_overflows(count, size, &count);
  QLORA_CHECK(!overflows, op, "packed", "a weight of fewer than 2^63 elements", sizes);
  return count;
}

// Whether contiguous() gives the numbers of a 4-bit weight's tensor in the weight's order: of a contiguous one, of one
// with rows as long as the weight's, and of a flat one. A transposed one has rows of another length, unless it is
// square.
inline bool is_in_order(const at::Tensor& tensor, int64_t row) {
  const auto sizes = tensor.sizes();
  return tensor.is_contiguous() || sizes.back() == row ||
         std::any_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size == tensor.numel(); });
}

// A 4-bit tensor argument, checked to hold exactly n elements in rows of `width`; it keeps the contiguous tensors that
// `view` points into.
struct Weight4bit {
  at::Tensor packed, absmax, nested_absmax, nested_offset;
  Packed4bit view;

  Weight4bit(const char* op, int64_t n, int64_t width, const at::Tensor& packed_arg, const at::Tensor& absmax_arg,
             const OptionalTensor& nested_absmax_arg, const OptionalTensor& nested_offset_arg,
             const std::string& quant_type, int64_t blocksize) {
    const QuantType type = checked_quant_type(op, quant_type);
    check_blocksize(op, blocksize);
    const int64_t num_blocks = ceil_div(n, blocksize);
    const bool nested = nested_absmax_arg.has_value();
    QLORA_CHECK(nested == nested_offset_arg.has_value(), op, "nested_offset",
                nested ? "a tensor, as nested_absmax is one" : "None, as nested_absmax is None",
                nested ? "None" : "a tensor");
    const auto absmax_dtype = nested ? at::kByte : at::kFloat;
    QLORA_CHECK_TYPE(packed_arg.scalar_type() == at::kByte, op, "packed", "dtype uint8", packed_arg.scalar_type());
    QLORA_CHECK_TYPE(absmax_arg.scalar_type() == absmax_dtype, op, "absmax",
                     nested ? "dtype uint8 (double quantization)" : "dtype float32 (nested_absmax is None)",
                     absmax_arg.scalar_type());
    check_device(op, "absmax", absmax_arg, packed_arg);
    QLORA_CHECK(packed_arg.numel() == ceil_div(n, 2), op, "packed",
                std::to_string(ceil_div(n, 2)) + " bytes for " + std::to_string(n) + " elements", packed_arg.numel());
    QLORA_CHECK(absmax_arg.numel() == num_blocks, op, "absmax",
                std::to_string(num_blocks) + " values for " + std::to_string(n) + " elements in blocks of " +
                    std::to_string(blocksize),
                absmax_arg.numel());
    for (const auto& [what, tensor, per] :
         {std::tuple{"packed", &packed_arg, int64_t{2}}, std::tuple{"absmax", &absmax_arg, blocksize}}) {
      QLORA_CHECK(is_in_order(*tensor, width / per), op, what,
                  "a contiguous tensor or rows of " + std::to_string(width / per), tensor->sizes());
    }
    packed = packed_arg.contiguous();
    absmax = absmax_arg.contiguous();
    view = {packed.const_data_ptr<uint8_t>(), absmax.const_data_ptr(), nullptr, nullptr, type, blocksize};
    if (!nested) return;
    for (const auto& [what, tensor, count] :
         {std::tuple{"nested_absmax", &*nested_absmax_arg, ceil_div(num_blocks, kNestedBlocksize)},
          std::tuple{"nested_offset", &*nested_offset_arg, int64_t{1}}}) {
      QLORA_CHECK_TYPE(tensor->scalar_type() == at::kFloat, op, what, "dtype float32", tensor->scalar_type());
      QLORA_CHECK(tensor->numel() == count, op, what, std::to_string(count) + " values", tensor->numel());
      check_device(op, what, *tensor, packed_arg);
    }
    nested_absmax = nested_absmax_arg->contiguous();
    nested_offset = nested_offset_arg->contiguous();
    view.nested_absmax = nested_absmax.const_data_ptr<float>();
    view.nested_offset = nested_offset.const_data_ptr<float>();
  }
};

// Dropout that keeps elements of x with these probabilities, by a seed for each.
inline void check_dropout(const char* op, const at::Tensor& x, c10::ArrayRef<double> keep, const at::Tensor& seed) {
  for (const double probability : keep) {
    QLORA_CHECK(probability >= 0 && probability <= 1, op, "keep", "a probability in [0, 1]", probability);
  }
  QLORA_CHECK_TYPE(seed.scalar_type() == at::kLong, op, "seed", "dtype int64", seed.scalar_type());
  const auto count = static_cast<int64_t>(keep.size());
  QLORA_CHECK(seed.numel() == count, op, "seed", std::to_string(count) + (count == 1 ? " number" : " numbers"),
              seed.sizes());
  check_device(op, "seed", seed, x);
}

// Adapters for x[..., K] -> [..., N]: A[i] is [r_i, K], B[i] [N, r_i]; keep and seed, if any, of the dropout before
// each.
inline void check_adapters(const char* op, const at::Tensor& x, int64_t N, at::TensorList A, at::TensorList B,
                           c10::ArrayRef<double> scaling, c10::ArrayRef<double> keep, const OptionalTensor& seed) {
  QLORA_CHECK(!A.empty(), op, "A", "at least 1 tensor", A.size());
  QLORA_CHECK(B.size() == A.size(), op, "B", std::to_string(A.size()) + " tensors, as in A", B.size());
  QLORA_CHECK(scaling.size() == A.size(), op, "scaling", std::to_string(A.size()) + " numbers, as in A",
              scaling.size());
  QLORA_CHECK(keep.empty() || keep.size() == A.size(), op, "keep",
              "no numbers or " + std::to_string(A.size()) + ", as in A", keep.size());
  QLORA_CHECK(seed.has_value() == !keep.empty(), op, "seed", keep.empty() ? "none without keep" : "one beside keep",
              seed.has_value() ? "one" : "none");
  for (size_t i = 0; i < A.size(); ++i) {
    checked_dtype(op, "A", A[i].scalar_type());
    checked_dtype(op, "B", B[i].scalar_type());
    check_device(op, "A", A[i], x);
    check_device(op, "B", B[i], x);
    QLORA_CHECK(A[i].dim() == 2 && A[i].size(1) == x.size(-1), op, "A", "shape [r, " + std::to_string(x.size(-1)) + "]",
                A[i].sizes());
    QLORA_CHECK(B[i].dim() == 2 && B[i].size(0) == N && B[i].size(1) == A[i].size(0), op, "B",
                "shape [" + std::to_string(N) + ", " + std::to_string(A[i].size(0)) + "]", B[i].sizes());
  }
  if (seed.has_value()) check_dropout(op, x, keep, *seed);
}

}  // namespace qlora
