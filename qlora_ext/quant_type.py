"""Which quant_type packed bytes are of, where nothing but the bytes can say it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_ext.functional import has_values

SAMPLE = 65536  # bytes: a large weight loads as fast as without a look at it
ENOUGH = 32  # of a code, that the lack of one as frequent is no chance
CHANCE = 16  # by which the counts of two codes that are meant equally often may differ


def quant_type_of(packed: Tensor, blocksize: int) -> str | None:
    """The quant_type of packed bytes as their codes tell it, or None if they do not.

    The largest value of a block is 1 or -1, so each block has one of these codes: 15 or 0 in NF4, 3 or 11 in FP4. What
    breaks one type's rule and keeps the other's is the other's.
    """
    if type(packed) not in (Tensor, nn.Parameter):  # a look at a DTensor would be a collective
        return None
    sample = packed.detach().reshape(-1)[:SAMPLE]
    if not has_values(sample):
        return None
    codes = torch.stack((sample >> 4, sample & 15), dim=-1).reshape(-1)
    last = codes[-1:].expand(-codes.numel() % blocksize)  # once more, to make a block of the rest
    blocks = torch.cat((codes, last)).reshape(-1, blocksize)
    may_be_nf4, may_be_fp4 = _has_extremes(blocks, 15, 0, zero=7), _has_extremes(blocks, 3, 11, zero=0)
    if may_be_nf4 != may_be_fp4:
        return "nf4" if may_be_nf4 else "fp4"
    return _by_frequency(codes.bincount(minlength=16).tolist())


def _has_extremes(blocks: Tensor, one: int, other: int, *, zero: int) -> bool:
    """Whether each block has one of both codes, or is all zeros."""
    has = ((blocks == one) | (blocks == other)).any(1) | (blocks == zero).all(1)
    return bool(has.all())


def _by_frequency(count: list[int]) -> str | None:
    """What tells the types apart where blocks are large or few, or an absmax is subnormal.

    Code 8 is NF4's first value above 0.0, about as frequent as its second, 9. FP4 has -0.0 there, which is never
    written here and seldom by bitsandbytes. NF4 bytes lack 8 too where the weight was rounded to a few values before,
    as by GPTQ; but there c and c + 8 are not equally frequent. In FP4 they are x and -x.
    """
    if 8 * count[8] > count[9]:
        return "nf4"
    others = [number for code, number in enumerate(count) if code != 8]
    pairs = [sorted((count[code], count[code + 8])) for code in range(1, 8)]
    return "fp4" if all(others) and count[9] >= ENOUGH and all(2 * a + CHANCE >= b for a, b in pairs) else None
