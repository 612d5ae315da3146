"""The tables of low-rank factors that a LoraLinear holds: one tensor an adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdapterTable(nn.ParameterDict):
    """A or B of each adapter of a layer, by adapter name.

    Its forward gives the tensors to compute with. accelerate's offloading keeps a module's parameters on meta and puts
    another forward in the place of the module's own, inside which they have their values; a look into the table finds
    none. So LoraLinear calls `table.forward`: not the table, which would cost as much as a small layer's product with A
    and give lists to whoever has put hooks on all modules.
    """

    def forward(self, names: list[str]) -> list[Tensor]:
        """The tensor of each of these adapters."""
        parameters = self._parameters
        try:  # nn.ParameterDict's own lookup takes long, too
            return [parameters[name] for name in names]  # type: ignore[misc]
        except KeyError:  # FSDP and parametrizations keep them elsewhere
            return [self[name] for name in names]


def check_device(names: list[str], A: list[Tensor], B: list[Tensor], device: torch.device) -> None:
    """Raise ValueError unless these adapters are there: torch multiplies with a tensor on meta, and gives garbage."""
    for i, tensor in enumerate((*A, *B)):
        if tensor.device != device:
            name = f"{'lora_A' if i < len(A) else 'lora_B'}.{names[i % len(A)]}"
            raise ValueError(f"LoraLinear: {name}: expected device {device}, got {tensor.device}")
