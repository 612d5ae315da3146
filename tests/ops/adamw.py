"""Parameters with the states of _C.adamw_step, and gradients for them."""

from __future__ import annotations

from typing import Any

import torch
from on_device import on
from reference import codebook
from torch import Tensor

from qlora_ext import _C

HYPER: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SIZES = (1, 255, 4096 + 100, 40_000)
BLOCK = 256


def parameters(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [torch.randn(n).to(dtype) for n in sizes]


def gradients(step: int, params: list[Tensor]) -> list[Tensor]:
    """Of different sizes, some of them 0, the same in every call."""
    generator = torch.Generator().manual_seed(step)
    sizes = [10.0 ** (-i) for i in range(len(params))]
    grads = [torch.randn(p.numel(), generator=generator) * size for p, size in zip(params, sizes, strict=True)]
    return [grad * (torch.rand(grad.numel(), generator=generator) > 0.1) for grad in grads]


class Ours:
    """Parameters with their states."""

    def __init__(self, params: list[Tensor], *, is_8bit: bool = False) -> None:
        self.params = [p.clone() for p in params]
        blocks = [-(-p.numel() // BLOCK) for p in params]
        self.absmax = [[torch.zeros(n) for n in blocks] if is_8bit else [] for _ in range(2)]
        if is_8bit:
            self.exp_avg = [torch.full((p.numel(),), 127, dtype=torch.uint8) for p in params]
            self.exp_avg_sq = [torch.zeros(p.numel(), dtype=torch.uint8) for p in params]
        else:
            self.exp_avg, self.exp_avg_sq = ([torch.zeros(p.numel()) for p in params] for _ in range(2))

    def step(self, step: int, grads: list[Tensor], **options: Any) -> None:
        _C.adamw_step(self.params, grads, self.exp_avg, self.exp_avg_sq, *self.absmax, step=step, **HYPER | options)

    def to(self, device: str) -> Ours:
        """Itself, with everything on that device."""
        for name in ("params", "exp_avg", "exp_avg_sq", "absmax"):
            setattr(self, name, on(device, getattr(self, name)))
        return self

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.exp_avg, *self.exp_avg_sq, *self.absmax[0], *self.absmax[1]]

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Decoded."""
        if not self.absmax[0]:
            return list(zip(self.exp_avg, self.exp_avg_sq, strict=True))
        books = codebook("dynamic"), codebook("dynamic_unsigned")
        decoded = [
            [
                book[codes.int()] * scale.repeat_interleave(BLOCK)[: codes.numel()]
                for codes, scale in zip(*one, strict=True)
            ]
            for book, one in zip(
                books, [(self.exp_avg, self.absmax[0]), (self.exp_avg_sq, self.absmax[1])], strict=True
            )
        ]
        return list(zip(*decoded, strict=True))
