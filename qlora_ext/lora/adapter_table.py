"""The tables of low-rank factors that a LoraLinear holds: one tensor an adapter."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from qlora_ext.casts import keeping_dtype


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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTable:
        """Adapters follow a move to another device, but no cast; nor does what they are made of."""
        super()._apply(keeping_dtype(fn, [*self.parameters(), *self.buffers()]), recurse)  # type: ignore[no-untyped-call]
        return self

    def __delitem__(self, name: str) -> None:
        if is_parametrized(self, name):
            remove_parametrizations(self, name)
        super().__delitem__(name)


def leaves(table: AdapterTable, name: str) -> list[Tensor]:
    """What trains of this adapter: its tensor, or what a parametrization makes that of, anew at each look."""
    if is_parametrized(table, name):
        parameters = table.parametrizations[name].parameters()  # type: ignore[index, union-attr]
        return [parameter for parameter in parameters if parameter.is_floating_point()]
    return [table[name]]


def check_values(names: list[str], A: list[Tensor], B: list[Tensor], like: Tensor) -> None:
    """Raise ValueError if one of these adapters is on meta: torch multiplies with such a tensor, and gives garbage."""
    if like.is_meta:
        return
    for i, tensor in enumerate((*A, *B)):
        if tensor.is_meta:
            name = f"{'lora_A' if i < len(A) else 'lora_B'}.{names[i % len(A)]}"
            raise ValueError(f"LoraLinear: {name}: expected device {like.device}, got {tensor.device}")
