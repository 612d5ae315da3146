"""The optimizers that bench_optimizer.py compares: the same update of the same parameters, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_ext import _C

OURS = "qlora_ext"
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
SAME: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
BLOCK = 256


@dataclass(frozen=True)
class Provider:
    """An optimizer.

    Args:
        name: as recorded; those of this library begin with its name.
        bits: of each of the two states of an element.
        make: (parameters, their gradients) -> a function that makes one step of them, in place; raises if it cannot.
    """

    name: str
    bits: int
    make: Callable[[list[Tensor], list[Tensor]], Callable[[], object]]

    def moved_bytes(self, params: list[Tensor]) -> int:
        """That a step cannot but move: parameters and states both ways, gradients one way."""
        return sum(p.numel() * (3 * p.element_size() + 4 * self.bits // 8) for p in params)


def ours(bits: int) -> Callable[[list[Tensor], list[Tensor]], Callable[[], object]]:
    """AdamW of this library with all states in memory."""

    def make(params: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
        dtype = torch.uint8 if bits == 8 else torch.float32
        exp_avg = [torch.full((p.numel(),), 127 if bits == 8 else 0, dtype=dtype) for p in params]
        exp_avg_sq = [torch.zeros(p.numel(), dtype=dtype) for p in params]
        absmax = [[torch.zeros(-(-p.numel() // BLOCK)) for p in params] if bits == 8 else [] for _ in range(2)]
        numbers = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY}
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            _C.adamw_step(params, grads, exp_avg, exp_avg_sq, *absmax, step=steps, **numbers)

        return step

    return make


def of_class(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., Callable[[], object]]:
    """Any torch.optim.Optimizer."""

    def make(params: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        step: Callable[[], object] = optimizer(params, **SAME, **options).step
        return step

    return make


def bitsandbytes(name: str) -> Callable[..., Callable[[], object]]:
    def make(params: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
        import bitsandbytes.optim

        return of_class(getattr(bitsandbytes.optim, name))(params, grads)

    return make


PROVIDERS = [
    Provider(f"{OURS} AdamW, 32-bit", 32, ours(32)),
    Provider(f"{OURS} AdamW, 8-bit", 8, ours(8)),
    Provider("torch AdamW, fused", 32, of_class(torch.optim.AdamW, fused=True)),
    Provider("bitsandbytes AdamW", 32, bitsandbytes("AdamW")),
    Provider("bitsandbytes AdamW8bit", 8, bitsandbytes("AdamW8bit")),
]
