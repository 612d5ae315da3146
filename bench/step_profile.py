"""Where the time of a training step goes, part by part: torch.profiler's self time of each op, given to its part.

A part is the innermost scope around a forward op; an op of the backward pass belongs to the part of the forward op that
made its node (both carry the same sequence number). What no op accounts for is Python and the autograd engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

SCOPE = "part: "
LINEAR, ATTENTION, NORMS, LAYERS = "linear layers", "attention, rotary", "norms", "activation, residuals, embedding"
LOSS, OPTIMIZER, PYTHON = "output head, cross-entropy", "optimizer, gradients' sums", "Python, autograd engine"
PARTS = (LINEAR, LOSS, ATTENTION, NORMS, LAYERS, OPTIMIZER, PYTHON)


def scope(part: str) -> Any:
    """A context: the ops inside belong to this part."""
    return record_function(SCOPE + part)


def mark_parts(model: nn.Module) -> None:
    """Put the scopes into a causal language model; what is outside its layers is the output head and the loss."""
    for module in list(model.modules()):
        kind = type(module).__name__
        if hasattr(module, "lora_A"):
            part = LINEAR
        elif kind.endswith("RMSNorm"):
            part = NORMS
        elif kind.endswith("Attention"):
            part = ATTENTION
        elif hasattr(module, "embed_tokens"):
            part = LAYERS
        else:
            continue
        module.forward = _scoped(part, module.forward)


def _scoped(part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with scope(part):
            return forward(*args, **kwargs)

    return call


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call of `step` in each of PARTS, under the profiler, which itself slows Python down."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        step()
        wall = time.perf_counter() - start
    seconds = _by_part(recorded.events() or ())
    seconds[PYTHON] += wall - sum(seconds.values())
    return seconds


def _by_part(events: Iterable[Any]) -> dict[str, float]:
    ordered = sorted(events, key=lambda event: event.time_range.start)
    made_by: dict[int, str] = {}  # of each sequence number, the part of the last forward op: that made the node
    for event in ordered:
        part = _part(event)
        if event.sequence_nr >= 0 and part is not None:
            made_by[event.sequence_nr] = part
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in ordered:
        if event.name.startswith((SCOPE, "autograd::engine::evaluate_function")):
            continue  # its own time is Python's, or the engine's
        part = _part(event) or _part_of_backward(event, made_by)
        if part is not None:
            seconds[part] += event.self_cpu_time_total * 1e-6
    return seconds


def _part(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(SCOPE):
            return str(event.name.removeprefix(SCOPE))
        event = event.cpu_parent
    return None


def _part_of_backward(event: Any, made_by: dict[int, str]) -> str | None:
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return OPTIMIZER if event.name.endswith("AccumulateGrad") else made_by.get(event.sequence_nr)
        event = event.cpu_parent
    return None
