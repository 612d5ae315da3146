"""Named shapes, by the code path that they reach, and inputs by seed: for the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import reference
import torch
from reference import Quantized
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

WEIGHT_SHAPES = {
    "rows": (8, 4096),
    "many-threads": (33, 4096),
    "experts": (2, 3, 8192),
    "short-rows": (5, 96),
    "rows-not-blocks": (3, 4304),
    "odd-count": (7, 33),
    "vector": (8192,),
    "one-element": (1,),
    "scalar": (),
    "no-rows": (0, 4096),
    "no-columns": (3, 0),
}

# (M, N, K) of y[M, N] = x[M, K] @ W[N, K].T
LINEAR_SHAPES = {
    "gemv": (1, 64, 4096),
    "gemv-long": (1, 24, 8192),
    "gemv-ragged-n": (1, 33, 256),
    "gemv-flat": (1, 40, 4304),
    "one-element": (1, 1, 1),
    "odd-k": (3, 5, 33),
    "few-rows": (2, 100, 320),
    "few-rows-short": (5, 17, 96),
    "few-rows-long": (7, 65, 4096),
    "rows": (17, 48, 256),
    "many-rows": (130, 64, 4096),
    "many-rows-ragged": (67, 130, 512),
    "many-rows-flat": (300, 70, 4304),
    "no-rows": (0, 8, 64),
    "no-outputs": (4, 0, 64),
    "no-inputs": (4, 8, 0),
}


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of the product of the axes in which every pair of values of two axes meets at least once."""
    product_rows = list(product(*axes))
    rows, seen = [], set()
    for wanted in range(len(axes) * (len(axes) - 1) // 2, 0, -1):
        for row in product_rows:
            new = set(combinations(enumerate(row), 2)) - seen
            if len(new) >= wanted:
                rows.append(row)
                seen |= new
    return rows


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal values; equal for equal arguments, and the same but for rounding in every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class WeightCase:
    """A weight to quantize."""

    shape_name: str
    dtype_name: str
    quant_type: str
    blocksize: int
    double_quant: bool

    def __str__(self) -> str:
        flag = "-dq" * self.double_quant
        return f"{self.dtype_name}-{self.quant_type}-b{self.blocksize}{flag}-{self.shape_name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return WEIGHT_SHAPES[self.shape_name]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


@dataclass(frozen=True)
class LinearCase:
    """A product with a quantized weight [n, k]."""

    mnk: tuple[int, int, int]
    dtype_name: str
    quant_type: str
    blocksize: int
    double_quant: bool
    bias: bool

    def __str__(self) -> str:
        flags = "-dq" * self.double_quant + "-bias" * self.bias
        m, n, k = self.mnk
        return f"{self.dtype_name}-{self.quant_type}-b{self.blocksize}{flags}-M{m}N{n}K{k}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def quantized(self) -> Quantized:
        return quantized_normal(self.mnk[1:], self.quant_type, self.blocksize, self.double_quant)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight; fp32 is the one that exact results are taken from."""
        return reference.dequantize_4bit(self.quantized, self.mnk[1:], dtype)


@cache
def quantized_normal(shape: tuple[int, ...], quant_type: str, blocksize: int, double_quant: bool) -> Quantized:
    """A weight as of a trained layer (values of about 0.02), by the oracle."""
    return reference.quantize(normal(*shape, seed=1) * 0.02, quant_type, blocksize, double_quant)


# One axis, so that every dtype meets every pair of quant_type and blocksize.
KINDS = list(product(DTYPES, QUANT_TYPES))
WEIGHT_CASES = [
    WeightCase(shape, *kind, blocksize, double_quant)
    for shape, kind, blocksize, double_quant in pairwise(WEIGHT_SHAPES, KINDS, BLOCKSIZES, (False, True))
]
LINEAR_CASES = [
    LinearCase(shape, *kind, blocksize, double_quant, bias)
    for shape, kind, blocksize, double_quant, bias in pairwise(
        LINEAR_SHAPES.values(), KINDS, BLOCKSIZES, (False, True), (False, True)
    )
] + [
    LinearCase((1, 512, 11008), "bf16", "nf4", 64, double_quant=True, bias=False),
    # rows of several chunks (of at most 528)
    LinearCase((1100, 96, 320), "bf16", "nf4", 64, double_quant=True, bias=True),
    LinearCase((1100, 96, 320), "fp32", "nf4", 64, double_quant=True, bias=False),
]
