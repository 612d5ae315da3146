"""Which quant_type packed bytes are of, where nothing but the bytes can say it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_ext._ops import codebook
from qlora_ext.functional import has_values

SAMPLE = 65536  # bytes: a large weight loads as fast as without a look at it
ENOUGH = 32  # so often a code must occur for the lack of an equally likely one to mean something
CHANCE = 16  # by which the counts of two codes that are meant equally often may differ


def quant_type_of(packed: Tensor, blocksize: int) -> str | None:
    """The quant_type of packed bytes as their codes tell it, or None if they do not.

    The largest value of a block is 1 or -1, so one of its codes is 15 or 0 in NF4, 3 or 11 in FP4. Bytes that break
    only one type's rule are of the other, unless the frequencies of their codes contradict it: blocks with an absmax
    under 1e-38 break their own (without large values they count for neither).
    """
    if type(packed) not in (Tensor, nn.Parameter):  # a look at a DTensor would be a collective
        return None
    sample = packed.detach().reshape(-1)[:SAMPLE]
    if not has_values(sample):
        return None
    codes = torch.stack((sample >> 4, sample & 15), dim=-1).reshape(-1)
    last = codes[-1:].expand(-codes.numel() % blocksize)  # once more, to make a block of the rest
    blocks = torch.cat((codes, last)).reshape(-1, blocksize)
    may_be = {name: _keeps_its_rule(blocks, name) for name in ("nf4", "fp4")}
    frequent = _by_frequency(codes.bincount(minlength=16).tolist())
    if may_be["nf4"] == may_be["fp4"]:
        return frequent
    ruled = "nf4" if may_be["nf4"] else "fp4"
    return ruled if frequent in (ruled, None) else None


def _keeps_its_rule(blocks: Tensor, quant_type: str) -> bool:
    """Whether each block with a large value has one that is 1 or -1."""
    values = torch.tensor(codebook(quant_type), device=blocks.device).abs()
    largest = values[blocks.long()].amax(1)
    return not ((largest > 0.2) & (largest < 1)).any()


def _by_frequency(count: list[int]) -> str | None:
    """What tells the types apart where blocks are large or few.

    Code 8 is NF4's first value above 0.0, about as frequent as its second, 9. FP4 has -0.0 there, which is never
    written here; bitsandbytes writes it for small values, as often as 0.0, code 0, that zeros get, too. NF4 bytes lack
    8 too where the weight was rounded to a few values before, as by GPTQ; but there c and c + 8 are not equally
    frequent: in FP4 x and -x.
    """
    pairs = [sorted((count[code], count[code + 8])) for code in range(1, 8)]
    are_signs = all(2 * less + CHANCE >= more for less, more in pairs)
    if 8 * count[8] > count[9]:
        return None if are_signs and 2 * count[0] + CHANCE >= count[8] else "nf4"
    has_all = all(number for code, number in enumerate(count) if code != 8)
    return "fp4" if has_all and count[9] >= ENOUGH and are_signs else None
