"""The optimizers that bench_optimizer.py compares: the same update of the same parameters, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora_ext import PagedAdamW

OURS = "qlora_ext"
SAME: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class Optimizer(Protocol):
    """What is used of one: the step that its users call, and where its states are."""

    state: Any

    def step(self) -> Any: ...


Make = Callable[[list[Parameter]], Optimizer]


@dataclass(frozen=True)
class Provider:
    """An optimizer.

    Args:
        name: as recorded; those of this library begin with its name.
        bits: of each of the two states of an element; torch has as many as the parameter has, if those are fewer.
        make: of parameters; raises if it cannot.
        cuda_only: there is nothing to measure on the CPU.
        offloaded: the states are in host memory while the parameters are on the GPU.
    """

    name: str
    bits: int
    make: Make
    cuda_only: bool = False
    offloaded: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def state_bytes(optimizer: Optimizer) -> int:
    """Of the states, once there are some: of ours whole pages, wherever they are."""
    if isinstance(optimizer, PagedAdamW):
        stats = optimizer.stats()
        return int((sum(stats["pages"].values()) + stats["ring_pages"]) * stats["page_bytes"])
    values = [value for state in optimizer.state.values() for value in state.values()]
    # bitsandbytes' parameters share their codebooks.
    return sum({value.data_ptr(): value.nbytes for value in values if isinstance(value, Tensor)}.values())


def ours(bits: int, **paging: Any) -> Make:
    return lambda params: PagedAdamW(params, state_bits=bits, **SAME, **paging)


def in_torch(**options: Any) -> Make:
    return lambda params: torch.optim.AdamW(params, **SAME, **options)


def in_bitsandbytes(name: str) -> Make:
    def make(params: list[Parameter]) -> Optimizer:
        import bitsandbytes.optim

        optimizer: Optimizer = getattr(bitsandbytes.optim, name)(params, **SAME)
        return optimizer

    return make


class Offloaded:
    """torchao's CPUOffloadOptimizer. A backward pass hands it the gradients, so each step begins with one."""

    def __init__(self, params: list[Parameter]) -> None:
        from torchao.optim import CPUOffloadOptimizer

        self._params = params
        self._optimizer = CPUOffloadOptimizer(params, torch.optim.AdamW, fused=True, **SAME)

    def step(self) -> None:
        for p in self._params:
            grad, p.grad = p.grad, None
            p.backward(grad)
        self._optimizer.step()

    @property
    def state(self) -> dict[Tensor, Any]:
        return {p: state for one in self._optimizer.optim_dict.values() for p, state in one.state.items()}


PROVIDERS = [
    Provider(f"{OURS} PagedAdamW, 32-bit", 32, ours(32)),
    Provider(f"{OURS} PagedAdamW, 8-bit", 8, ours(8)),
    Provider("torch AdamW, fused", 32, in_torch(fused=True)),
    Provider("torch AdamW, foreach", 32, in_torch(foreach=True)),
    Provider("bitsandbytes AdamW", 32, in_bitsandbytes("AdamW")),
    Provider("bitsandbytes AdamW8bit", 8, in_bitsandbytes("AdamW8bit")),
    # On the CPU, bitsandbytes warns and does not page.
    Provider("bitsandbytes PagedAdamW", 32, in_bitsandbytes("PagedAdamW"), cuda_only=True),
    Provider("bitsandbytes PagedAdamW8bit", 8, in_bitsandbytes("PagedAdamW8bit"), cuda_only=True),
    Provider(f"{OURS} PagedAdamW, 32-bit, offloaded", 32, ours(32, device_budget=0), cuda_only=True, offloaded=True),
    Provider("torchao CPUOffloadOptimizer", 32, Offloaded, cuda_only=True, offloaded=True),
]
