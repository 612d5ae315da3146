"""The weight that a bench of one shape and dtype works on."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

import qlora_ext

QUANT_TYPE, BLOCKSIZE = "nf4", 64


class Weight:
    """Normal values of about the size of a trained layer's, [N, K], and their 4-bit form.

    Attributes:
        source: in the bench's dtype.
        packed, state: as quantize_4bit gives them.
    """

    def __init__(self, N: int, K: int, dtype: torch.dtype, *, double_quant: bool = True) -> None:
        self.N, self.K, self.dtype, self.double_quant = N, K, dtype, double_quant
        generator = torch.Generator().manual_seed(0)
        self.source = (torch.randn(N, K, generator=generator) * 0.02).to(dtype)
        self.packed, self.state = qlora_ext.quantize_4bit(
            self.source, quant_type=QUANT_TYPE, blocksize=BLOCKSIZE, double_quant=double_quant
        )

    @cached_property
    def decoded(self) -> Tensor:
        """fp32, as the format defines it; tests/ holds it to the reference bit for bit."""
        return qlora_ext.dequantize_4bit(self.packed, self.state, torch.float32)

    @cached_property
    def exact(self) -> Tensor:
        """The fp32-decoded weight in fp64, for results to be compared with."""
        return self.decoded.double()

    @cached_property
    def dense(self) -> Tensor:
        """The decoded weight in the bench's dtype."""
        return self.decoded.to(self.dtype)

    @property
    def packed_bytes(self) -> int:
        """Of the 4-bit form, with its scales."""
        tensors = (self.packed, self.state.absmax, self.state.nested_absmax, self.state.nested_offset)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def random(self, rows: int, columns: int, seed: int = 1) -> Tensor:
        """An input in the bench's dtype."""
        return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
