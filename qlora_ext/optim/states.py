"""The state of one parameter of PagedAdamW: which parts it has, in which forms, and its checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qlora_ext import _C
from qlora_ext.sharded import is_dtensor, local_shard, placements

PARTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")  # in the order of the C++ enum Part
NAMES = frozenset(("step", *PARTS))  # in a state_dict
MOST_STEPS = 1 << 53  # whole numbers that a float has
_MIN_8BIT_SIZE = 4096  # elements; smaller parameters have 32-bit states


class Form(NamedTuple):
    """What one part of a parameter's state is as a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Saved(NamedTuple):
    """A parameter's state outside of the pages: each part as a tensor, or as an offset into a file."""

    steps: int
    parts: dict[str, Tensor | int]


def has_state(entry: Any) -> bool:
    """Whether an entry of a state_dict has a part of a state, or is no dict, which checked_state refuses."""
    return not isinstance(entry, dict) or not NAMES.isdisjoint(entry)


def state_width(p: Tensor, state_bits: int) -> int:
    """How many bits p's states have."""
    return state_bits if local_shard(p).numel() >= _MIN_8BIT_SIZE else 32


def state_forms(p: Tensor, state_bits: int) -> dict[str, Form]:
    """The parts of p's state, of its local shard."""
    local = local_shard(p)
    if state_width(p, state_bits) == 32:
        return dict.fromkeys(PARTS[:2], Form(torch.float32, tuple(local.shape)))
    absmax = Form(torch.float32, (-(-local.numel() // _C.ADAMW_BLOCK),))
    return dict.fromkeys(PARTS[:2], Form(torch.uint8, tuple(local.shape))) | dict.fromkeys(PARTS[2:], absmax)


def checked_states(
    op: str, params: Iterable[Tensor], state_bits: int, entries: Mapping[Any, Any]
) -> dict[Tensor, Saved]:
    """The states of these parameters that are among the entries of a state_dict.

    Raises:
        ValueError: one is not for its parameter and states of this width.
    """
    return {
        p: checked_state(op, index, p, state_bits, entries[p])
        for index, p in enumerate(params)
        if p in entries and has_state(entries[p])
    }


def checked_state(op: str, index: int, p: Tensor, state_bits: int, entry: dict[str, Any]) -> Saved:
    """An entry of a state_dict, if it is one for p with states of this width.

    Raises:
        ValueError: a part is missing or has another shape, or its dtype is not the width's.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{op}: state of parameter {index}: expected a dict, got {type(entry).__name__}")
    if entry.get("max_exp_avg_sq") is not None:
        raise ValueError(f"{op}: state of parameter {index}: expected no max_exp_avg_sq, got that of amsgrad=True")
    try:
        steps = float(entry["step"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        steps = -1.0
    if not steps.is_integer() or not 0 <= steps < MOST_STEPS:
        raise ValueError(f"{op}: step of parameter {index}: expected a whole number, got {entry.get('step')}")
    parts: dict[str, Tensor | int] = {}
    for part, (dtype, shape) in state_forms(p, state_bits).items():
        value = entry.get(part)
        got = "nothing" if value is None else type(value).__name__
        if isinstance(value, Tensor):
            if is_dtensor(value) and placements(value) != placements(p):
                raise ValueError(
                    f"{op}: {part} of parameter {index}: expected placements {placements(p)}, got {placements(value)}"
                )
            value = local_shard(value)
            readable = value.layout is torch.strided and not value.is_meta and not value._is_zerotensor()
            readable = readable and not is_traceable_wrapper_subclass(value) and not isinstance(value, FakeTensor)
            if tuple(value.shape) == shape and _kind(value.dtype) == _kind(dtype) and readable:
                parts[part] = value
                continue
            got = f"{_kind(value.dtype)} {list(value.shape)}" + (
                "" if readable else f" ({type(value).__name__}, {value.layout}, on {value.device})"
            )
        expected = f"{_kind(dtype)} {list(shape)}"
        raise ValueError(f"{op}: {part} of parameter {index}: expected {expected}, got {got}")
    return Saved(int(steps), parts)


def _kind(dtype: torch.dtype) -> str:
    """All floats are one kind: torch.optim.AdamW's states have the dtype of their parameter."""
    return "floats" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
