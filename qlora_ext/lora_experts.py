"""LoRA on the weights of fused experts: W0[i] + scaling B[i] A[i], as PEFT's target_parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_ext.adapter_table import check_values
from qlora_ext.experts import Matrix4bit, Split, Stack4bit
from qlora_ext.lora import LoraLinear


class LoraExperts(LoraLinear):
    """A frozen Stack4bit with adapters, of which each matrix has its own part.

    Attributes:
        lora_A, lora_B: float32 parameters [experts, r, in] and [experts, out, r] by adapter name.
        in_features, out_features: of all matrices, one below the other; those of a product are `base_layer.sizes`.
    """

    base_layer: Stack4bit

    def _factors(self, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
        experts, (size_in, size_out) = self.base_layer.shape[0], self.base_layer.sizes
        A = torch.empty(experts, r, size_in, dtype=torch.float32, device=device)
        return A, torch.empty(experts, size_out, r, dtype=torch.float32, device=device)

    def forward(self, index: int, split: Split | None = None) -> Matrix4bit:  # type: ignore[override]
        """The matrix with this number, with the active adapters' parts for it."""
        merged, names = self.merged_base, self.active_adapters
        base: Any = self.base_layer if merged is None else merged
        matrix: Matrix4bit = base(index)
        if merged is None and names:
            A, B = self.lora_A.forward(names), self.lora_B.forward(names)
            check_values(names, A, B, base.weight)
            matrix.A = [_part(a, index, split) for a in A]
            matrix.B = [_part(b, index, split) for b in B]
            matrix.scaling = [self.scaling[name] for name in names]
        return matrix

    def _updated(self, weight: Tensor, names: list[str]) -> Tensor:
        A, B = self.lora_A.forward(names), self.lora_B.forward(names)
        check_values(names, A, B, weight)
        matrices = weight.view(self.base_layer.shape)
        with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):  # meta has none
            for name, a, b in zip(names, A, B, strict=True):
                factors = (a.mT, b.mT) if self.base_layer.is_transposed else (b, a)
                matrices.baddbmm_(*factors, alpha=self.scaling[name])  # of a weight decoded for this
        return weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrices with the active adapters' updates in `dtype` (None: the original's), one below the other."""
        if isinstance(self.merged_base, Stack4bit):
            return self.merged_base.dequantize(dtype)
        return self.merged_weight().to(dtype or self.dtype)


def _part(factor: Tensor, index: int, split: Split | None) -> Tensor:
    """A or B of the matrix with this number.

    With a gradient it comes from one split for all matrices, whose backward puts their gradients side by side; that of
    factor[index] would make one of the whole factor's size for each.
    """
    if split is None or not (torch.is_grad_enabled() and factor.requires_grad):
        return factor[index]
    if factor not in split:
        split[factor] = factor.unbind()
    return split[factor][index]
