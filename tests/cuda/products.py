"""Cases of the fused products, and inputs for which fp32 sums are exact in any order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import reference
import torch
from cases import QUANT_TYPES, LinearCase, normal, pairwise
from reference import NESTED_BLOCKSIZE, Quantized
from torch import Tensor

DTYPES = ("fp16", "bf16")
KINDS = list(product(DTYPES, QUANT_TYPES))
BLOCKSIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class ProductCase(LinearCase):
    """On a GPU of so many multiprocessors."""

    num_sms: int

    def __str__(self) -> str:
        return f"{super().__str__()}-sms{self.num_sms}"


def cases(shapes: list[tuple[int, int, int]], num_sms: tuple[int, ...], bias: tuple[bool, ...]) -> list[ProductCase]:
    """Every pair of settings. K: a multiple of 256, so that each blocksize can take it."""
    rows = pairwise(shapes, KINDS, BLOCKSIZES, (False, True), bias, num_sms)
    return [ProductCase(mnk, *kind, *settings) for mnk, kind, *settings in rows]


@dataclass(frozen=True)
class ExactProduct:
    """weight: of q in fp64, its codes rounded to the dtype as the kernel's table holds them."""

    case: ProductCase
    q: Quantized
    weight: Tensor

    def largest_exact_sum(self) -> float:
        """fp32 holds every multiple of the last place of the smallest weight up to here."""
        fraction_bits = 10 if self.case.dtype == torch.float16 else 7
        return float(self.weight[self.weight != 0].abs().min().log2().floor().exp2()) * 2.0 ** (24 - fraction_bits)

    def factor(self, width: int) -> Tensor:
        """[M, width] integers in [-2, 2], as many of them 0 as keep all sums exact: a product is 8 at most."""
        shape = self.case.mnk[0], width
        values = torch.randint(-2, 3, shape) * (torch.rand(shape) < self.largest_exact_sum() / 8 / width)
        return values.to(self.case.dtype)

    def bias(self) -> Tensor | None:
        return torch.randint(-8, 9, (self.case.mnk[1],)).to(self.case.dtype) if self.case.bias else None

    def expected(self, factor: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """factor @ weight + bias, rounded once. The sums are exact in every order."""
        added = torch.zeros(weight.shape[1]) if bias is None else bias
        largest = (factor.double().abs() @ weight.abs() + added.double().abs()).max()
        assert largest <= self.largest_exact_sum()
        return (factor.double() @ weight + added.double()).float().to(self.case.dtype)


# The codes that the kernels' table rounds the other way than to nearest (csrc/cuda/pair_table.cuh).
ROUNDED_AWAY = {("nf4", torch.bfloat16): (6, 12), ("nf4", torch.float16): (5,)}


def table_values(quant_type: str, dtype: torch.dtype) -> Tensor:
    """The codes' values as the kernels' table holds them, in fp64."""
    exact = reference.codebook(quant_type)
    values = exact.to(dtype)
    for code in ROUNDED_AWAY.get((quant_type, dtype), ()):
        beyond = torch.where(values[code].double() > exact[code].double(), -torch.inf, torch.inf).to(dtype)
        values[code] = torch.nextafter(values[code], beyond)
    return values.double()


def exact_product(case: ProductCase) -> ExactProduct:
    """Random codes, every scale a power of two."""
    _, n, k = case.mnk
    packed = torch.randint(256, (n, k // 2), dtype=torch.uint8)
    num_blocks = n * k // case.blocksize
    if case.double_quant:  # codes of 0.0 and 1.0: offset, or offset + nested_absmax
        absmax = torch.tensor([127, 255], dtype=torch.uint8)[torch.randint(2, (num_blocks,))]
        nested_absmax = torch.tensor([1.0, 3.0])[torch.randint(2, (-(-num_blocks // NESTED_BLOCKSIZE),))]
        q = Quantized(packed, absmax.view(n, -1), nested_absmax, torch.tensor(1.0), case.quant_type, case.blocksize)
    else:
        absmax = torch.tensor([1.0, 2.0, 4.0])[torch.randint(3, (num_blocks,))]
        q = Quantized(packed, absmax.view(n, -1), None, None, case.quant_type, case.blocksize)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(n, k).long()
    values = table_values(case.quant_type, case.dtype)[codes]
    weight = values * reference.decode_absmax(q).double().view(n, -1).repeat_interleave(case.blocksize, 1)
    return ExactProduct(case, q, weight)


def random_product(case: ProductCase, width: int) -> tuple[Quantized, Tensor]:
    """A weight as of a trained layer, and x or grad [M, width]."""
    return case.quantized, normal(case.mnk[0], width, dtype=case.dtype, seed=2)
