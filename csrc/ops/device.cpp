#include "device.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include <vector>

namespace qlora {
namespace {

using at::Tensor;

const Device* cuda_device = nullptr;

Tensor masked(const MaskedMatrix& matrix, at::ScalarType dtype) {
  const Tensor values = matrix.values.to(dtype);
  return matrix.mask.defined() ? at::masked_fill(values, at::logical_not(matrix.mask), 0) : values;
}

}  // namespace

const Device& device_for(const Tensor& tensor) {
  if (tensor.is_cpu()) return cpu_device();
  TORCH_CHECK_VALUE(tensor.is_cuda() && cuda_device != nullptr, "qlora_ext: expected device cpu",
                    cuda_device != nullptr ? " or cuda" : " (built without CUDA)", ", got ", tensor.device());
  return *cuda_device;
}

void register_cuda_device(const Device& device) { cuda_device = &device; }

Tensor Device::mm(const MaskedMatrix& a, const MaskedMatrix& b, double scale, at::ScalarType compute,
                  at::ScalarType out) const {
  Tensor product = at::mm(masked(a, compute), masked(b, compute)).to(out);
  if (scale != 1.0) product.mul_(scale);  // after .to: who scales asks for fp32, as 16 bits would round once more
  return product;
}

// Adapters without a mask side by side, so that `out` is read and written once however many there are. Factors as a
// linear layer's weight lies, [J, r]: of a few rows, torch's product with [r, J] has twice the error and more.
void add_low_rank(const Tensor& out, LowRankList added) {
  const auto dtype = out.scalar_type();
  std::vector<Tensor> x, weights;
  for (const LowRank& one : added) {
    const Tensor weight = at::mul(one.factor.t().to(at::kFloat).contiguous(), one.scale).to(dtype);  // rounded once
    if (one.mask.defined()) {
      out.add_(masked({at::mm(one.x.to(dtype), weight.t()), one.mask}, dtype));
    } else {
      x.push_back(one.x.to(dtype));
      weights.push_back(weight);
    }
  }
  if (!x.empty()) out.addmm_(at::cat(x, 1), at::cat(weights, 1).t());
}

}  // namespace qlora
