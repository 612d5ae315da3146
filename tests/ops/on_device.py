"""Values with tensors in them, moved to a device: for the tests on a GPU."""

from __future__ import annotations

from typing import Any

from reference import Quantized
from torch import Tensor


def on(device: str, value: Any) -> Any:
    """The value (a tensor, a Quantized, a tuple or a list of such) with its tensors on this device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Quantized):
        return Quantized(*(on(device, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(on(device, item) for item in value)
    return value


def cpu(value: Any) -> Any:
    return on("cpu", value)
