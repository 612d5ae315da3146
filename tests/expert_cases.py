"""Four matrices in 4 bits, the rows that each of them meets, adapters on them, and the products in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases import quantized_normal
from reference import Quantized, dequantize_4bit
from torch import Tensor

# (in, out) of a matrix; of "flat" no row is of whole blocks, where matrices are [out, in].
SHAPES = {"blocks": (256, 192), "flat": (96, 128)}
# The rows of each of four experts, and how many are behind them.
COUNTS = {"some": ((3, 0, 40, 1), 0), "behind": ((0, 5, 2, 0), 3), "one": ((0, 0, 0, 130), 0), "none": ((0,) * 4, 2)}


def ends(*counts: int) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def stack(size_in: int, size_out: int, is_transposed: bool) -> tuple[Quantized, Tensor]:
    """Four matrices, and what they are decoded, [4, out, in]."""
    shape = (size_in, size_out) if is_transposed else (size_out, size_in)
    q = quantized_normal((4 * shape[0], shape[1]), "nf4", 64, double_quant=size_in * size_out % (256 * 64) == 0)
    decoded = dequantize_4bit(q, (4, *shape), torch.float32)
    return q, decoded.mT if is_transposed else decoded


def plain(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The products with each matrix in plain PyTorch, in the dtype of x."""
    begins = [0, *offs[:-1].tolist()]
    parts = [x[b:e] @ w.to(x.dtype).T for b, e, w in zip(begins, offs.tolist(), weight, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - int(offs[-1]), weight.shape[1])])


def adapters(ranks: Sequence[int], size_in: int, size_out: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """A, B and scaling for four experts, of the size that they have in training."""
    return (
        [torch.randn(4, r, size_in) / size_in**0.5 for r in ranks],
        [torch.randn(4, size_out, r) * 0.1 for r in ranks],
        [2.0 / (i + 1) for i in range(len(ranks))],
    )


def plain_lora(x: Tensor, weight: Tensor, offs: Tensor, ab: Sequence[Tensor], scaling: list[float]) -> list[Tensor]:
    """y, and xA up to the last end, in plain PyTorch in the dtype of x."""
    y, parts = plain(x, weight, offs), []
    for a, b, scale in zip(ab[: len(scaling)], ab[len(scaling) :], scaling, strict=True):
        parts.append(plain(x, a, offs))
        y = y + scale * plain(parts[-1], b, offs)
    return [y, torch.cat(parts, 1)[: int(offs[-1])]]
