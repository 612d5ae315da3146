"""Tells torch.utils.flop_counter how many floating-point operations the ops take, when that is imported: it may import
triton, which takes longer than all of qlora_ext."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from qlora_ext._ops import ops

_COUNTER = "torch.utils.flop_counter"

# Two operations a multiply-add, as torch counts its own products, and none for decoding. Tensors come as their shapes.


def _product(x: torch.Size, *others: object, out_shape: torch.Size, **_: object) -> int:
    return 2 * x.numel() * out_shape[-1]


def _lora(x: torch.Size, *others: object, out_shape: tuple[torch.Size, torch.Size], **_: object) -> int:
    y, xA = out_shape
    return 2 * x.numel() * (y[-1] + xA[-1]) + 2 * xA.numel() * y[-1]


def _lora_backward(
    grad: torch.Size, x: torch.Size, xA: torch.Size, *others: object, out_shape: tuple[Any, Any, Any], **_: object
) -> int:
    # What is not wanted is [0], of experts' factors no tensor at all.
    with_grad_x, with_grad_A, with_grad_B = (tuple(shape) not in ((0,), ()) for shape in out_shape)
    of_grad_xA = of_B = 2 * grad.numel() * xA[-1]
    of_A, of_x = 2 * x.numel() * xA[-1], 2 * x.numel() * (grad[-1] + xA[-1])
    return (with_grad_x or with_grad_A) * of_grad_xA + with_grad_x * of_x + with_grad_A * of_A + with_grad_B * of_B


def _register(counter: ModuleType) -> None:
    if ops.linear_4bit in counter.flop_registry:  # after a reload
        return
    counter.register_flop_formula([ops.linear_4bit, ops.linear_4bit_dgrad, ops.experts_4bit])(_product)
    counter.register_flop_formula([ops.lora_linear_4bit, ops.lora_experts_4bit])(_lora)
    counter.register_flop_formula([ops.lora_linear_4bit_backward, ops.lora_experts_4bit_backward])(_lora_backward)


class _AtImport(MetaPathFinder):
    """Finds the counter as others do, and registers when it has run."""

    def __init__(self) -> None:
        self.here = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER or getattr(self.here, "asks_others", False):
            return None
        self.here.asks_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.here.asks_others = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == _COUNTER:  # a loader may be of several
                    _register(module)

            loader.exec_module = execute_and_register
        return spec


def register_flops() -> None:
    """Let torch's FlopCounterMode count the ops, whenever it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AtImport())
