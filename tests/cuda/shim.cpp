// The launchers as C functions for ctypes. Every argument is an int64_t, pointers too, or an array of them.
#include <vector>

#include "launch.h"

using Integer = std::int64_t;

namespace {

template <typename T = void>
T* at(Integer address) {
  return reinterpret_cast<T*>(address);
}

struct Weight {
  Integer packed, absmax, nested_absmax, nested_offset, quant_type, blocksize;

  operator qlora::Packed4bit() const {
    return {.packed = at<const std::uint8_t>(packed),
            .absmax = at<const void>(absmax),
            .nested_absmax = at<const float>(nested_absmax),
            .nested_offset = at<const float>(nested_offset),
            .quant_type = static_cast<qlora::QuantType>(quant_type),
            .blocksize = blocksize};
  }
};

struct Product {
  Integer x;
  Weight weight;
  Integer bias, out, M, N, K, dtype;

  operator qlora::cuda::Product4bit() const {
    return {.x = at<const void>(x),
            .w = weight,
            .bias = at<const void>(bias),
            .out = at(out),
            .M = M,
            .N = N,
            .K = K,
            .dtype = static_cast<qlora::DType>(dtype)};
  }
};

struct Slice {
  Integer param, grad, param_dtype, grad_dtype, count, first, index;
  Integer exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, step, maximize;
};

struct Options {
  Integer grad_scale, found_inf, stochastic_rounding, seed;

  operator qlora::AdamwOptions() const {
    return {.grad_scale = at<const float>(grad_scale),
            .found_inf = at<const float>(found_inf),
            .stochastic_rounding = stochastic_rounding != 0,
            .seed = static_cast<std::uint64_t>(seed)};
  }
};

struct Limits {
  Integer num_sms, shared_bytes_per_sm;

  operator qlora::cuda::DeviceLimits() const {
    return {.num_sms = static_cast<int>(num_sms), .shared_bytes_per_sm = static_cast<int>(shared_bytes_per_sm)};
  }
};

}  // namespace

extern "C" {

int quantize_4bit(Integer weight, Integer dtype, Integer n, Integer blocksize, Integer quant_type, Integer packed,
                  Integer absmax, Integer stream) {
  return qlora::cuda::launch_quantize_4bit(at<const void>(weight), static_cast<qlora::DType>(dtype), n, blocksize,
                                           static_cast<qlora::QuantType>(quant_type), at<std::uint8_t>(packed),
                                           at<float>(absmax), at<CUstream_st>(stream));
}

int quantize_absmax(Integer absmax, Integer n, Integer group_sums, Integer codes, Integer nested_absmax,
                    Integer nested_offset, Integer stream) {
  return qlora::cuda::launch_quantize_absmax(at<const float>(absmax), n, at<double>(group_sums),
                                             at<std::uint8_t>(codes), at<float>(nested_absmax),
                                             at<float>(nested_offset), at<CUstream_st>(stream));
}

int dequantize_4bit(const Weight* weight, Integer K, const qlora::Slice* slice, Integer dtype, Integer out,
                    Integer stream) {
  return qlora::cuda::launch_dequantize_4bit(*weight, K, *slice, static_cast<qlora::DType>(dtype), at(out),
                                             at<CUstream_st>(stream));
}

int dropout_mask(Integer seed, Integer kept_below, Integer n, Integer kept, Integer stream) {
  return qlora::cuda::launch_dropout_mask(at<const std::int64_t>(seed), static_cast<std::uint32_t>(kept_below), n,
                                          at<std::uint8_t>(kept), at<CUstream_st>(stream));
}

bool takes_fused(const Product* product) { return qlora::cuda::takes_fused(*product); }

Integer linear_4bit_workspace_bytes(const Product* product, const Limits* limits) {
  return qlora::cuda::linear_4bit_workspace_bytes(*product, *limits);
}

int linear_4bit(const Product* product, const Limits* limits, Integer workspace, Integer stream) {
  return qlora::cuda::launch_linear_4bit(*product, *limits, at(workspace), at<CUstream_st>(stream));
}

Integer linear_4bit_dgrad_workspace_bytes(const Product* product, const Limits* limits) {
  return qlora::cuda::linear_4bit_dgrad_workspace_bytes(*product, *limits);
}

int linear_4bit_dgrad(const Product* product, const Limits* limits, Integer workspace, Integer stream) {
  return qlora::cuda::launch_linear_4bit_dgrad(*product, *limits, at(workspace), at<CUstream_st>(stream));
}

Integer adamw_table_bytes(Integer n) { return qlora::cuda::adamw_table_bytes(n); }

// numbers: of each slice lr, beta1, beta2, eps, weight_decay. Returns adamw_blocks.
Integer fill_adamw_table(const Slice* from, const double (*numbers)[5], Integer n, const Options* options,
                         Integer table) {
  std::vector<qlora::AdamwHyper> hypers;
  std::vector<qlora::AdamwSlice> slices;
  hypers.reserve(static_cast<std::size_t>(n));
  for (Integer i = 0; i < n; ++i) {
    const Slice& one = from[i];
    const double (&number)[5] = numbers[i];
    hypers.push_back({number[0], number[1], number[2], number[3], number[4], one.step, one.maximize != 0});
    slices.push_back({.param = at(one.param),
                      .grad = at<const void>(one.grad),
                      .param_dtype = static_cast<qlora::DType>(one.param_dtype),
                      .grad_dtype = static_cast<qlora::DType>(one.grad_dtype),
                      .count = one.count,
                      .first = one.first,
                      .index = static_cast<std::uint64_t>(one.index),
                      .exp_avg = at(one.exp_avg),
                      .exp_avg_sq = at(one.exp_avg_sq),
                      .exp_avg_absmax = at<float>(one.exp_avg_absmax),
                      .exp_avg_sq_absmax = at<float>(one.exp_avg_sq_absmax),
                      .hyper = &hypers.back()});
  }
  qlora::cuda::fill_adamw_table(slices.data(), n, *options, at(table));
  return qlora::adamw_blocks(slices.data(), n);
}

int adamw(Integer table, Integer n, Integer blocks, const Options* options, Integer stream) {
  return qlora::cuda::launch_adamw(at<const void>(table), n, blocks, *options, at<CUstream_st>(stream));
}

}  // extern "C"
