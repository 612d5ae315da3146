"""Adapters on a weight in 4 bits, and the layer as the op and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from reference import Quantized
from torch import Tensor

# (M, N, K); K is no multiple of the blocksize in the one named flat.
SHAPES = {
    "gemv": (1, 48, 256),
    "few-rows": (5, 33, 128),
    "few-panels": (40, 33, 128),
    "many-rows": (130, 64, 192),
    "flat": (9, 24, 100),
    "no-rows": (0, 8, 64),
}
RANKS = {"r8": (8,), "r1": (1,), "r5-r16": (5, 16), "r5-r16-r8": (5, 16, 8)}

Forward = Callable[[Tensor, Tensor | None, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


def adapters(ranks: Sequence[int], n: int, k: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Random A, B and scaling, of the size that they have in training."""
    return (
        [torch.randn(r, k) / k**0.5 for r in ranks],
        [torch.randn(n, r) * 0.1 for r in ranks],
        [2.0 / (i + 1) for i in range(len(ranks))],
    )


def fused(
    q: Quantized, n: int, scaling: list[float], keep: Sequence[float] = (), seed: Tensor | None = None
) -> Forward:
    return lambda x, bias, a, b: torch.ops.qlora_ext.lora_linear_4bit(x, *q, n, bias, a, b, scaling, keep, seed)


def masks(x: Tensor, keep: Sequence[float], seed: Tensor | None) -> list[Tensor]:
    """Those of dropout before each adapter."""
    return [torch.ops.qlora_ext.dropout_mask(x, k, seed[i]) for i, k in enumerate(keep) if seed is not None]


def plain(weight: Tensor, scaling: list[float], keep: Sequence[float] = (), seed: Tensor | None = None) -> Forward:
    """The same in plain PyTorch, all in the dtype of x."""

    def forward(x: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        y, parts, mask = F.linear(x, weight, bias), [x[..., :0]], masks(x, keep, seed)
        for i in range(len(a)):
            parts.append(F.linear(x * mask[i] if mask else x, a[i].to(x.dtype)))
            y = y + scaling[i] * F.linear(parts[-1], b[i].to(x.dtype))
        return y, torch.cat(parts, dim=-1)

    return forward


def with_gradients(forward: Forward, leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """[y, xA, grad_x, grad_bias, grads of A, grads of B] for leaves [x, bias, A ..., B ...]."""
    x, bias, *ab = leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y, xa = forward(x, bias, ab[: len(ab) // 2], ab[len(ab) // 2 :])
    return [y, xa, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]
