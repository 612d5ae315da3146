"""One linear layer with a LoRA adapter: ours, and PEFT's on bitsandbytes' 4-bit layer and on a dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from exactness import checked_rows
from linear_providers import checked_error
from suite import OURS, Case, MissingPeerError, Provider
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from weight import BLOCKSIZE, QUANT_TYPE, Weight, bytes_of

import qlora_ext

R, SCALING = 16, 2.0
ALONE = f"{OURS} linear_4bit alone"


@dataclass
class Step:
    """What a training step gives to a layer: x [M, K] and the gradient of its result [M, N]."""

    x: Tensor
    grad: Tensor


def forward(weight: Weight) -> list[Provider]:
    """y = x @ W.T + SCALING * (x @ A.T) @ B.T, with what the backward pass needs kept."""

    def bind(layer: nn.Module, step: Step) -> Callable[[], Tensor]:
        return partial(layer, step.x.detach().requires_grad_())

    ours, *peers = _providers(weight, bind)
    return [ours, Provider(ALONE, partial(_linear_4bit, weight), bind, weight.packed_bytes), *peers]


def backward(weight: Weight) -> list[Provider]:
    """dx, dA and dB from the gradient of y; the forward pass before it is not timed."""

    def bind(layer: nn.Module, step: Step) -> Callable[[], tuple[Tensor, ...]]:
        x = step.x.detach().requires_grad_()
        y = get_gradient_edge(layer(x))  # not y itself, which would stay in memory for each copy
        return lambda: torch.autograd.grad([y], (x, *_adapter_of(layer)), [step.grad], retain_graph=True)

    return _providers(weight, bind)


def forward_case(weight: Weight, M: int) -> Case:
    """The input, and the check of y."""
    step, picked = _step(weight, M), checked_rows(M)
    some = step.x[picked]
    A, B = _adapter(weight, weight.dtype)
    base, base_by_torch = some.double() @ weight.exact.T, F.linear(some, weight.dense)
    exact = base + SCALING * (some.double() @ A.double().T) @ B.double().T
    by_torch = base_by_torch + SCALING * F.linear(F.linear(some, A), B)

    def check(name: str, y: Tensor) -> float:
        expected = (base, base_by_torch) if name == ALONE else (exact, by_torch)
        return checked_error(name, *expected, y.detach()[picked])

    return Case(step, check, bytes_of(step.x, step.grad, A, B), flops=_flops(weight, M, low_rank_products=2))


def backward_case(weight: Weight, M: int) -> Case:
    """The input and the gradient of y, and the check of the three results."""
    step, picked = _step(weight, M), checked_rows(M)
    A, B = _adapter(weight, weight.dtype)

    def gradients(x: Tensor, grad: Tensor, W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        low_rank = SCALING * grad @ B
        return grad[picked] @ W + low_rank[picked] @ A, low_rank.T @ x, SCALING * grad.T @ (x @ A.T)

    exact = gradients(step.x.double(), step.grad.double(), weight.exact, A.double(), B.double())
    by_torch = gradients(step.x, step.grad, weight.dense, A, B)

    def check(name: str, got: tuple[Tensor, ...]) -> float:
        dx, dA, dB = got
        return max(checked_error(name, *each) for each in zip(exact, by_torch, (dx[picked], dA, dB), strict=True))

    # Read: x, grad, A, B; written: dx (as large as x), dA, dB. x @ A.T is kept from the forward pass.
    moved = bytes_of(step.x, step.x, step.grad, A, A, B, B)
    x_in_fp32 = 4 * step.x.numel()  # PEFT keeps it, where its adapters are fp32
    return Case(step, check, moved, flops=_flops(weight, M, low_rank_products=4), held_bytes=x_in_fp32)


def _step(weight: Weight, M: int) -> Step:
    return Step(weight.random(M, weight.K), weight.random(M, weight.N, seed=2))


def _flops(weight: Weight, M: int, *, low_rank_products: int) -> int:
    """Of the large product and of the low-rank ones, half of them N wide and half K."""
    return 2 * M * weight.N * weight.K + low_rank_products * M * R * (weight.N + weight.K)


def _adapter(weight: Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R], the same values in every dtype, so large that a wrong update would be noticed."""
    A, B = weight.random(R, weight.K, seed=3) * 0.02, weight.random(weight.N, R, seed=4) * 0.1
    return A.to(dtype), B.to(dtype)


def _adapter_of(layer: nn.Module) -> list[Tensor]:
    """A and B: all that trains."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _with_adapter(weight: Weight, layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter, values in zip(_adapter_of(layer), _adapter(weight, weight.dtype), strict=True):
            parameter.copy_(values)
    return layer.train()


def _providers(weight: Weight, bind: Callable[[Any, Any], Callable[[], Any]]) -> list[Provider]:
    providers = [Provider(OURS, partial(_ours, weight), bind, weight.packed_bytes)]
    for dtype in dict.fromkeys((torch.float32, weight.dtype)):  # PEFT keeps adapters in fp32 unless told otherwise
        for base, make, size in (
            ("bitsandbytes", _bitsandbytes_layer, weight.packed_bytes),
            (f"torch {str(weight.dtype)[6:]} linear", _dense_layer, bytes_of(weight.source)),
        ):
            name = f"PEFT + {base}, {str(dtype)[6:]} adapter"
            providers.append(Provider(name, partial(_peft, weight, make, dtype), bind, size))
    return providers


def _linear_4bit(weight: Weight) -> qlora_ext.Linear4bit:
    dense = nn.Linear(weight.K, weight.N, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.source, requires_grad=False)
    return qlora_ext.Linear4bit.from_linear(dense, quant_type=QUANT_TYPE, blocksize=BLOCKSIZE)


def _ours(weight: Weight) -> nn.Module:
    layer = qlora_ext.LoraLinear(_linear_4bit(weight))
    layer.add_adapter("default", qlora_ext.LoraConfig(r=R, lora_alpha=SCALING * R))
    layer.active_adapters = ["default"]
    return _with_adapter(weight, layer)


def _peft(weight: Weight, make: Callable[[Weight], nn.Module], adapter_dtype: torch.dtype) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingPeerError("peft is not installed") from error
    model: Any = nn.Module()
    model.linear = make(weight)
    model.is_loaded_in_4bit = make is _bitsandbytes_layer  # what PEFT looks for
    config = peft.LoraConfig(r=R, lora_alpha=int(SCALING * R), target_modules=["linear"])
    layer: nn.Module = peft.inject_adapter_in_model(config, model).linear
    for parameter in _adapter_of(layer):
        parameter.data = parameter.data.to(adapter_dtype)
    return _with_adapter(weight, layer)


def _bitsandbytes_layer(weight: Weight) -> nn.Module:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise MissingPeerError("bitsandbytes is not installed") from error
    layer: Any = Linear4bit(
        weight.K, weight.N, bias=False, compute_dtype=weight.dtype, quant_type=QUANT_TYPE, device="meta"
    )
    layer.weight = Params4bit(weight.source, requires_grad=False, quant_type=QUANT_TYPE).to("cpu")
    return layer


def _dense_layer(weight: Weight) -> nn.Module:
    layer = nn.Linear(weight.K, weight.N, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.dense, requires_grad=False)
    return layer
