"""QuantState: what is needed, beside the packed bytes, to read a 4-bit tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class QuantState:
    """The description of one 4-bit tensor (README, "Storage format").

    Args:
        shape: of the original tensor.
        dtype: of the original tensor; what `dequantize_4bit` gives back by default.
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, a power of two from 32 to 4096.
        absmax: float32 [num_blocks] (or row-shaped [..., in/blocksize]); uint8 codes with double quantization.
        nested_absmax: float32 [ceil(num_blocks/256)], with double quantization only.
        nested_offset: float32, 0-d, with double quantization only.
    """

    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def double_quant(self) -> bool:
        """Whether absmax itself is quantized to 8 bits."""
        return self.nested_absmax is not None

    def to(self, device: torch.device | str) -> QuantState:
        """The same state with its tensors on `device`."""
        return QuantState(
            self.shape,
            self.dtype,
            self.quant_type,
            self.blocksize,
            self.absmax.to(device),
            None if self.nested_absmax is None else self.nested_absmax.to(device),
            None if self.nested_offset is None else self.nested_offset.to(device),
        )
