"""QuantState: what is needed, beside the packed bytes, to read a 4-bit tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

_FIELDS = {"dtype": torch.dtype, "quant_type": str, "blocksize": Integral, "absmax": Tensor}


@dataclass(frozen=True, eq=False)
class QuantState:
    """The description of one 4-bit tensor (README, "Storage format").

    Args:
        shape: of the original tensor, a torch.Size or another sequence of int.
        dtype: of the original tensor; what `dequantize_4bit` gives back by default.
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, a power of two from 32 to 4096.
        absmax: float32 [num_blocks] (or row-shaped [..., in/blocksize]); uint8 codes with double quantization.
        nested_absmax: float32 [ceil(num_blocks/256)], with double quantization only.
        nested_offset: float32, 0-d, with double quantization only.

    Raises:
        TypeError: an argument of the wrong type. What the ops check (sizes, dtypes of tensors, values) they check.
    """

    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, torch.Size):
            shape: Any = self.shape  # a list, say, as JSON gives it
            if not isinstance(shape, Sequence) or not all(isinstance(n, Integral | torch.SymInt) for n in shape):
                raise TypeError(f"QuantState: shape: expected a torch.Size or another sequence of int, got {shape!r}")
            object.__setattr__(self, "shape", torch.Size(shape))
        for what, kind in _FIELDS.items():
            check_type("QuantState", what, getattr(self, what), kind)
        for what in ("nested_absmax", "nested_offset"):
            if (value := getattr(self, what)) is not None:
                check_type("QuantState", what, value, Tensor)

    @property
    def double_quant(self) -> bool:
        """Whether absmax itself is quantized to 8 bits."""
        return self.nested_absmax is not None

    def to(self, device: torch.device | str) -> QuantState:
        """The same state with its tensors on `device`."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def check_type(op: str, what: str, value: object, kind: type) -> None:
    """Raise TypeError unless the argument is of this kind."""
    if not isinstance(value, kind):
        special: dict[type, str] = {Integral: "an int", str: "a str"}
        name = special.get(kind, f"a {kind.__module__}.{kind.__name__}")
        raise TypeError(f"{op}: {what}: expected {name}, got {type(value).__name__}")


torch.serialization.add_safe_globals([QuantState])  # so torch.load reads one as it reads tensors
