"""LoRA on the weights of fused experts: W0[i] + scaling B[i] A[i], as PEFT's target_parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_ext.experts import Stack4bit
from qlora_ext.lora.adapter_table import check_values
from qlora_ext.lora.linear import LoraLinear


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

    def forward(self, input: Tensor, offs: Tensor) -> Tensor:  # type: ignore[override]
        """Each matrix, with the active adapters' parts for it, times its rows, as Stack4bit's."""
        merged, names = self.merged_base, self.active_adapters
        base: Any = self.base_layer if merged is None else merged
        adapters: list[Any] = []
        if merged is None and names:
            A, B = self.lora_A.forward(names), self.lora_B.forward(names)
            check_values(names, A, B, input)
            adapters = [A, B, [self.scaling[name] for name in names]]
        y: Tensor = base(input, offs, *adapters)
        return y

    def _add(self, weight: Tensor, b: Tensor, a: Tensor, *, alpha: float) -> Tensor:
        factors = (a.mT, b.mT) if self.base_layer.is_transposed else (b, a)
        weight.view(self.base_layer.shape).baddbmm_(*factors, alpha=alpha)
        return weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrices with the active adapters' updates in `dtype` (None: the original's), one below the other."""
        if isinstance(self.merged_base, Stack4bit):
            return self.merged_base.dequantize(dtype)
        return self.merged_weight().to(dtype or self.dtype)
