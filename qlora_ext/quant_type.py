"""Which quant_type packed bytes are of, where nothing but the bytes can say it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_ext.functional import has_values

SAMPLE = 65536  # bytes: a large weight loads as fast as without a look at it
ENOUGH = 32  # of a code, that the lack of one as frequent is no chance


def quant_type_of(packed: Tensor) -> str | None:
    """The quant_type of packed bytes as the frequencies of their codes tell it, or None if they do not.

    Code 8 is NF4's first value above 0.0, about as frequent as its second, 9. FP4 has -0.0 there, which is never
    written here and seldom by bitsandbytes. NF4 bytes lack 8 too where the weight was rounded to a few values before,
    as by GPTQ; those have far more of 7, NF4's 0.0, than of 15, its 1.0. In FP4 these are +0.25 and -0.25.
    """
    if type(packed) not in (Tensor, nn.Parameter):  # a look at a DTensor would be a collective
        return None
    sample = packed.detach().reshape(-1)[:SAMPLE]
    if not has_values(sample):
        return None
    count = torch.cat((sample >> 4, sample & 15)).bincount(minlength=16).tolist()
    if 8 * count[8] > count[9]:
        return "nf4"
    others = [number for code, number in enumerate(count) if code != 8]
    return "fp4" if all(others) and count[9] >= ENOUGH and 2 * count[15] > count[7] else None
