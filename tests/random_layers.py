"""Layers and adapters with random weights, their gradients and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qlora_ext import Linear4bit, LoraConfig, LoraLinear


def make_linear(
    in_features: int = 256, bias: bool = True, dtype: torch.dtype = torch.float32, *, double_quant: bool = True
) -> Linear4bit:
    """A layer with 48 outputs and random weights. With 100 inputs its layout is flat, for 64 does not divide 100."""
    linear = nn.Linear(in_features, 48, bias=bias, dtype=dtype)
    return Linear4bit.from_linear(linear, double_quant=double_quant)


BASES = ("nn.Linear", "Linear4bit")


def make_base(base: str, in_features: int = 256, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Either kind of base layer; the nn.Linear holds the decoded weight of the other."""
    layer = make_linear(in_features, bias, dtype)
    if base == "Linear4bit":
        return layer
    linear = nn.Linear(in_features, 48, bias=bias, dtype=dtype)
    linear.weight.data = layer.dequantize()
    return linear


def make_lora(base: nn.Module, *configs: LoraConfig) -> LoraLinear:
    """With adapters "a0", "a1", ..., all active, none zero."""
    layer = LoraLinear(base)
    for i, config in enumerate(configs):
        layer.add_adapter(f"a{i}", config)
        layer.active_adapters.append(f"a{i}")
    randomize_adapters(layer)
    return layer


def randomize_adapters(model: nn.Module) -> None:
    """Give each B, which starts as zero, values of the size that they have in training."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            for b in layer.lora_B.values():
                nn.init.normal_(b, std=0.1)


def with_gradients(
    forward: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor | None = None
) -> list[Tensor]:
    """[y, gradient of each leaf] of y = forward(*leaves), with grad (None: ones) as the gradient of y."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = forward(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if grad is None else grad.to(y.dtype))]


def state_bytes(module: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """The state_dict as comparable values: equal if every tensor is, bit for bit."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in module.state_dict().items()
    }


def names_of(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    """The modules of exactly this class."""
    return {name for name, module in model.named_modules() if type(module) is kind}


class TwoPlaces(nn.Module):
    """One linear layer under three names: two in one parent, one in another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"a": nn.Linear(64, 64)})
        self.first["b"] = self.first["a"]
        self.second = nn.ModuleDict({"c": self.first["a"], "d": nn.Linear(64, 64)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second["d"](self.second["c"](self.first["b"](self.first["a"](x))))


class WithAttention(nn.Module):
    """nn.MultiheadAttention reads the weight of its out_proj by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.proj = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attention(x, x, x)[0])
