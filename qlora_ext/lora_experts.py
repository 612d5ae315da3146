"""LoRA on the weights of fused experts: W0[i] + scaling B[i] A[i], as PEFT's target_parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ext.adapter_table import check_values
from qlora_ext.experts import Matrix4bit, Stack4bit
from qlora_ext.lora import LoraLinear


class LoraExperts(LoraLinear):
    """A frozen Stack4bit with adapters, of which each matrix has its own part.

    Attributes:
        lora_A, lora_B: float32 parameters [experts, r, in] and [experts, out, r] by adapter name.
    """

    base_layer: Stack4bit

    def __init__(self, base_layer: Stack4bit) -> None:
        super().__init__(base_layer)
        self._split: dict[str, tuple[Tensor, int, tuple[Tensor, ...]]] = {}

    def _factors(self, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
        experts, (size_in, size_out) = self.base_layer.shape[0], self.base_layer.sizes
        A = torch.empty(experts, r, size_in, dtype=torch.float32, device=device)
        return A, torch.empty(experts, size_out, r, dtype=torch.float32, device=device)

    def forward(self, index: int) -> Matrix4bit:  # type: ignore[override]
        """The matrix with this number, with the active adapters' parts for it."""
        merged, names = self.merged_base, self.active_adapters
        base: Any = self.base_layer if merged is None else merged
        matrix: Matrix4bit = base(index)
        if merged is None and names:
            A, B = self.lora_A.forward(names), self.lora_B.forward(names)
            check_values(names, A, B, base.weight)
            matrix.A = [self._matrices(f"A.{name}", a)[index] for name, a in zip(names, A, strict=True)]
            matrix.B = [self._matrices(f"B.{name}", b)[index] for name, b in zip(names, B, strict=True)]
            matrix.scaling = [self.scaling[name] for name in names]
        return matrix

    def _matrices(self, key: str, factor: Tensor) -> Sequence[Tensor]:
        """A or B of each matrix.

        Where they get gradients they come from one split, kept while the factor is the same: the backward of a split
        puts the gradients of all side by side, that of factor[i] makes one of the whole factor's size for each i.
        """
        if not (torch.is_grad_enabled() and type(factor) is nn.Parameter and factor.requires_grad):
            return factor  # type: ignore[return-value]
        kept, version, matrices = self._split.get(key, (None, 0, ()))
        if kept is not factor or version != factor._version or matrices[0].data_ptr() != factor.data_ptr():
            matrices = factor.unbind()
            self._split[key] = factor, factor._version, matrices
        return matrices

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

    def delete_adapter(self, name: str) -> None:
        """As LoraLinear's."""
        super().delete_adapter(name)
        self._split.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_split": {}}  # of no use to a copy, nor to be copied
