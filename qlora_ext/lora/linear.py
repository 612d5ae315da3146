"""LoRA on one linear layer: W = W0 + scaling B A, W0 frozen, only A and B train (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qlora_ext._ops import ops
from qlora_ext.dense_linear import (
    computes_otherwise,
    dense_class,
    has_float_weight,
    is_dense_linear,
    oriented,
    out_and_in,
    stored_shape,
)
from qlora_ext.functional import cast_as_autocast
from qlora_ext.layer_hooks import has_other_forward, is_hooked, of_accelerate, with_bias_of
from qlora_ext.linear import Linear4bit, dense
from qlora_ext.lora.adapted_weight import WeightInBits
from qlora_ext.lora.adapter_table import AdapterTable, check_values, leaves
from qlora_ext.lora.config import LoraConfig
from qlora_ext.lora.names import check_name
from qlora_ext.weight_4bit import Weight4bit


class LoraLinear(nn.Module):
    """A frozen linear layer with adapters: y = base(x) + sum over active adapters of scaling (dropout(x) A^T) B^T.

    Args:
        base_layer: nn.Linear, transformers' Conv1D or Linear4bit; kept as it is.

    Attributes:
        base_layer: the layer itself.
        lora_A, lora_B: float32 parameters [r, in] and [out, r] by adapter name; cast to x's dtype, or float32, inside
            the multiply, and never cast by `.half()` or `.to(dtype)`.
        lora_dropout: nn.Dropout by adapter name, of which only p and the training flag are used; it is not called.
        scaling, configs: by adapter name.
        active_adapters: names of those that are applied.
        merged_base: while merged, a layer of the same kind with W0 + the active updates; base_layer stays untouched. It
            is no child and no part of the state_dict, but made again when one is loaded.

    Raises:
        TypeError: base_layer is another module.
    """

    def __init__(self, base_layer: nn.Linear | Weight4bit) -> None:
        super().__init__()
        if not isinstance(base_layer, Weight4bit) and not is_dense_linear(base_layer):
            got = type(base_layer).__name__
            raise TypeError(f"LoraLinear: base_layer: expected nn.Linear, Conv1D or Linear4bit, got {got}")
        self.base_layer = base_layer
        self.lora_A = AdapterTable()
        self.lora_B = AdapterTable()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = []
        self.merged_base: nn.Linear | Weight4bit | None = None
        self.register_load_state_dict_post_hook(_merge_again)  # type: ignore[no-untyped-call]
        self.train(base_layer.training)

    @property
    def in_features(self) -> int:
        return out_and_in(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        return out_and_in(self.base_layer)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype (of the original weight, if it is 4-bit)."""
        base = self.base_layer
        return base.dtype if isinstance(base, Weight4bit) else base.weight.dtype

    @property
    def merged(self) -> bool:
        """Whether the active adapters are inside merged_base."""
        return self.merged_base is not None

    def add_adapter(self, name: str, config: LoraConfig, module_name: str = "") -> None:
        """Add an adapter, inactive; A as nn.Linear starts, B zero, so that the layer computes what it did.

        Args:
            name: of the adapter; no dots, and no attribute of nn.ParameterDict.
            config: its LoraConfig.
            module_name: this layer's name in its model, for rank_pattern and alpha_pattern.

        Raises:
            TypeError, ValueError: the name is no str, is not as above, or there is an adapter of it.
        """
        check_name("LoraLinear", name, self.configs)
        with torch.inference_mode(False):  # an inference tensor could never be trained or, outside, be activated
            A, B = self._factors(config.rank(module_name), self.base_layer.weight.device)
            nn.init.kaiming_uniform_(A.flatten(0, -2), a=math.sqrt(5))
            factors = nn.Parameter(A), nn.Parameter(nn.init.zeros_(B))
            self.lora_A[name], self.lora_B[name] = factors
        self.set_config(name, config, module_name)

    def set_config(self, name: str, config: LoraConfig, module_name: str) -> None:
        """Scale an adapter, and drop out before it, by this config; module_name as for add_adapter."""
        self.scaling[name] = config.scaling(module_name)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self.configs[name] = config

    @property
    def tables(self) -> dict[str, AdapterTable]:
        """lora_A and lora_B, by these names."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def leaves(self, name: str) -> list[Tensor]:
        """What trains of this adapter."""
        return [leaf for table in self.tables.values() for leaf in leaves(table, name)]

    def _factors(self, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Empty tensors for A and B of this rank."""
        A = torch.empty(r, self.in_features, dtype=torch.float32, device=device)
        return A, torch.empty(self.out_features, r, dtype=torch.float32, device=device)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; KeyError if there is none of this name."""
        for table in (self.lora_A, self.lora_B, self.lora_dropout, self.scaling, self.configs):
            del table[name]
        self.active_adapters = [active for active in self.active_adapters if active != name]

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        # One look at each: another thread may merge or activate others meanwhile.
        merged, names = self.merged_base, self.active_adapters
        parts: Any = self._modules  # without __getattr__
        base = parts["base_layer"] if merged is None else with_bias_of(parts["base_layer"], merged)
        if merged is not None or not names:
            return base(input)  # type: ignore[no-any-return]
        A, B = parts["lora_A"].forward(names), parts["lora_B"].forward(names)
        scaling, keep = self._dropout(names)
        if isinstance(base, Linear4bit) and not is_hooked(base):
            seed = torch.randint(2**63 - 1, (len(keep),), device=A[0].device) if keep else None
            return base.forward_with_adapters(input, A, B, scaling, keep, seed)
        x = cast_as_autocast(input)
        y = base(x)
        if not isinstance(y, Tensor):
            kind, got = type(base).__name__, type(y).__name__
            raise TypeError(f"LoraLinear: base_layer: expected a tensor from {kind}'s forward, got {got}")
        if x.device != y.device:  # to which hooks of the base have taken it
            x = x.to(y.device)
        check_values(names, A, B, x)
        for i, (a, b) in enumerate(zip(A, B, strict=True)):
            low_rank = F.linear(x * _dropout_mask(x, keep[i]) if keep else x, a.to(x.dtype))
            y = y + F.linear(low_rank, (b.float() * scaling[i]).to(x.dtype))
        return y

    def _dropout(self, names: list[str]) -> tuple[list[float], list[float]]:
        """The scaling of each of these adapters, with dropout's 1 / (1 - p) in it, and, if there is any, the
        probability 1 - p that an element of x counts."""
        scaling = [self.scaling[name] for name in names]
        table: Any = self._modules["lora_dropout"]  # without __getattr__
        dropouts = map(table.__getitem__, names)
        keep = [1 - each.p if each.training and not isinstance(each, nn.Identity) else 1 for each in dropouts]
        if all(k == 1 for k in keep):
            return scaling, []
        return [s / k if k else 0.0 for s, k in zip(scaling, keep, strict=True)], keep

    @property
    def weight(self) -> Tensor:
        """W0 + the updates of the active adapters, in the base's dtype and as it stores them, for models that read it.

        It is made anew each time, with gradients for the adapters, without dropout. If the base's weight has another
        form, as in 4 bits, only dtype, device, shape and the like can be read, which models ask for. Assigning it, or
        bias, assigns the base's, which is how models tie weights.
        """
        merged, names = self.merged_base, self.active_adapters
        base = self.base_layer if merged is None else merged
        if isinstance(base, Weight4bit):
            return WeightInBits(self, base)  # type: ignore[return-value]
        if merged is not None or not names:
            return base.weight
        if not has_float_weight(base):
            return WeightInBits(self, base)  # type: ignore[return-value]
        kind, weight = dense_class(base), base.weight
        updated = self._updated(oriented(kind, weight).float(), names, torch.addmm)
        return oriented(kind, updated).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's, [out]."""
        return self.base_layer.bias

    @bias.setter
    def bias(self, bias: Tensor | None) -> None:
        self.base_layer.bias = bias  # type: ignore[assignment]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Of weight and bias: in the base."""
        if name in ("weight", "bias"):
            self.base_layer.register_parameter(name, param)
        else:
            super().register_parameter(name, param)

    @torch.inference_mode(False)  # autograd saves no inference tensor, which a dense layer would be given
    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W0 + the updates of the active adapters, float32 [out, in].

        Raises:
            TypeError: the base has a weight in a form of its own, or a forward that is not its class's; or a
                parametrized bias, or weight if its class computes in its own way.
            ValueError: an active adapter is on meta, as one that accelerate has offloaded.
        """
        base, names = self.base_layer, self.active_adapters
        if has_other_forward(base):  # of accelerate's hooks: it would go on computing with the base's weight
            expected, got = f"the forward of its class, {type(base).__name__}", f"another{of_accelerate(base)}"
            raise TypeError(f"LoraLinear: base_layer: expected {expected}, got {got}")
        computed = "weight" not in base._parameters and (
            computes_otherwise(base) or (is_parametrized(base) and is_hooked(base))
        )
        if computed or (getattr(base, "bias", None) is not None and "bias" not in base._parameters):
            got = type(base).__name__
            raise TypeError(f"LoraLinear: base_layer: expected weight and bias without parametrizations, got {got}")
        if isinstance(base, Weight4bit):
            weight = base.dequantize(torch.float32)
        elif has_float_weight(base):
            weight = oriented(dense_class(base), base.weight).to(torch.float32, copy=bool(names))  # updated in place
        else:
            got = f"{type(base).__name__}'s {type(base.weight).__name__}, {base.weight.dtype} {list(base.weight.shape)}"
            shape = stored_shape(dense_class(base), *out_and_in(base))
            raise TypeError(f"LoraLinear: base_layer: expected a float weight {shape} to merge into, got {got}")
        return self._updated(weight, names, self._add)

    def _updated(self, weight: Tensor, names: list[str], add: Callable[..., Tensor]) -> Tensor:
        """`add`: of a weight, B and A; in place or not."""
        A, B = self.lora_A.forward(names), self.lora_B.forward(names)
        check_values(names, A, B, weight)
        with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):  # meta has none
            for name, a, b in zip(names, A, B, strict=True):
                weight = add(weight, b.float(), a.float(), alpha=self.scaling[name])
        return weight

    def _add(self, weight: Tensor, b: Tensor, a: Tensor, *, alpha: float) -> Tensor:
        """Add alpha B A to the weight, in place."""
        return weight.addmm_(b, a, alpha=alpha)

    @torch.inference_mode(False)
    def merge(self, weight: Tensor | None = None) -> None:
        """Compute with one layer of the base's own kind that holds W0 + the updates (quantized again if it is 4-bit).

        The base itself is kept, so `unmerge` restores it bit for bit. `weight`: merged_weight(), if it is known.
        """
        base = self.base_layer
        weight = self.merged_weight() if weight is None else weight
        merged: nn.Linear | Weight4bit
        if isinstance(base, Weight4bit):
            merged = base.with_weight(oriented(base.dense_class, weight))
        else:
            merged = dense(base, weight)
        object.__setattr__(self, "merged_base", merged)  # as a child it would be in the state_dict

    def unmerge(self) -> None:
        """Compute with the base and its adapters again."""
        self.merged_base = None

    def train(self, mode: bool = True) -> LoraLinear:
        """As nn.Module's, of the merged layer too."""
        if self.merged_base is not None:
            self.merged_base.train(mode)
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and self.merged_base is not None:
            self.merged_base._apply(fn)
        return self


def base_of(layer: nn.Module) -> Any:
    """The layer below adapters; one without any is it itself."""
    return layer.base_layer if isinstance(layer, LoraLinear) else layer


def _merge_again(layer: LoraLinear, _: object) -> None:
    """After loading a state_dict: the merged layer follows from the base and the adapters that it held."""
    if layer.merged:
        layer.unmerge()
        layer.merge()


def _dropout_mask(x: Tensor, keep: float) -> Tensor:
    """Which elements of x are kept, each with this probability."""
    # A DTensor or a fake tensor knows torch's way alone, which on most CPUs draws one number after the other.
    if type(x) in (Tensor, nn.Parameter) and x.is_cpu:
        seed = torch.randint(2**63 - 1, (), device="cpu")
        return ops.dropout_mask(x, keep, seed)  # type: ignore[no-any-return]
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(keep)
