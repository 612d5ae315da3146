"""To which part of a training step the profile gives the time of an op."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import peers
import smollm2
import step_profile
from step_profile import ATTENTION, LAYERS, LINEAR, LOSS, NORMS, OPTIMIZER, PARTS, SCOPE

ENGINE = "autograd::engine::evaluate_function: "
BEGIN = count()


def event(name: str, microseconds: float, parent: Any = None, node: int = -1) -> SimpleNamespace:
    """As torch.profiler's; each begins after the one that was made before it."""
    made: dict[str, Any] = {"name": name, "self_cpu_time_total": microseconds, "cpu_parent": parent}
    return SimpleNamespace(**made, sequence_nr=node, time_range=SimpleNamespace(start=next(BEGIN)))


def test_ops_are_of_the_innermost_scope_and_backward_of_the_op_that_made_the_node() -> None:
    loss = event(SCOPE + LOSS, 1000)
    layers = event(SCOPE + LAYERS, 1000, loss)
    linear = event(SCOPE + LINEAR, 1000, layers)
    product = event("aten::mm", 1, linear, node=7)
    inner = event("aten::empty", 2, product)
    add = event("aten::add", 4, layers, node=8)
    head = event("aten::mm", 8, loss, node=9)
    of_head, of_add, of_product = (event(ENGINE + "Backward0", 1000, node=node) for node in (9, 8, 7))
    backward = [event("aten::mm", 16, of_head), event("aten::sum", 32, of_add)]
    call = event("MmBackward0", 64, of_product, node=7)
    backward += [call, event("aten::mm", 128, call)]
    gradient = event(ENGINE + "torch::autograd::AccumulateGrad", 1000, node=10)
    step = event(SCOPE + OPTIMIZER, 1000)
    rest = [event("aten::add_", 256, gradient), event("aten::lerp_", 512, step), event("aten::item", 2048)]
    forward = [loss, layers, linear, product, inner, add, head]
    events = [*forward, of_head, of_add, of_product, *backward, gradient, step, *rest]
    microseconds = {part: round(1e6 * seconds) for part, seconds in step_profile._by_part(reversed(events)).items()}
    expected = {LINEAR: 1 + 2 + 64 + 128, LAYERS: 4 + 32, LOSS: 8 + 16, OPTIMIZER: 256 + 512}
    assert microseconds == dict.fromkeys(PARTS, 0) | expected, "what is in no scope is Python's share of the clock"


@pytest.mark.parametrize("method", peers.METHODS)
def test_modules_have_the_parts_of_their_kinds(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, set[str]] = {}

    def scoped(part: str, forward: Any) -> Any:
        given.setdefault(part, set()).add(type(forward.__self__).__name__)
        return forward

    monkeypatch.setattr(step_profile, "_scoped", scoped)
    step_profile.mark_parts(peers.METHODS[method](smollm2.load(None, dtype=torch.float32, tiny=True), 0.0))
    (layer,) = given.pop(LINEAR)
    assert layer in ("LoraLinear", "Linear4bit", "Linear")  # ours, and PEFT's on each of its bases
    assert given == {ATTENTION: {"LlamaAttention"}, NORMS: {"LlamaRMSNorm"}, LAYERS: {"LlamaModel"}}
