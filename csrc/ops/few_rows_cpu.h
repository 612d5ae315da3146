// The CPU's products with few rows, which the weight meets as it is decoded, adapters included.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cpu/row_products.h"
#include "device.h"

namespace qlora {

// y = x @ W^T + bias + added, for cpu::most_few_rows of x at most; none of `added` has a mask.
void linear_4bit_few_rows(const at::Tensor& x, const Packed4bit& w, const at::Tensor& bias, LowRankList added,
                          const at::Tensor& y);

// grad_x = grad @ W + added, for cpu::most_few_rows_of_grad and at least one row; none of `added` has a mask.
void linear_4bit_dgrad_few_rows(const at::Tensor& grad, const Packed4bit& w, LowRankList added,
                                const at::Tensor& grad_x);

// A matrix whose rows are contiguous, as are those of its mask, if that is defined.
cpu::Rows cpu_rows(const at::Tensor& m, const at::Tensor& mask = {});

}  // namespace qlora
