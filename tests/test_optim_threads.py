"""PagedAdamW in several threads: one saves while another steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import paging
from safetensors.torch import load_file
from torch.nn import Parameter

from qlora_ext import PagedAdamW

STEPS = 40


def save_to_file(optimizer: PagedAdamW, folder: Path) -> list[float]:
    optimizer.save_states(folder / "states.safetensors")
    tensors = load_file(folder / "states.safetensors")
    return [float(tensor.abs().sum()) for name, tensor in tensors.items() if name.endswith("exp_avg")]


def make_state_dict(optimizer: PagedAdamW, _: Path) -> list[float]:
    states = optimizer.state_dict()["state"].values()
    assert len({int(state["step"]) for state in states}) == 1
    return [float(state["exp_avg"].abs().sum()) for state in states]


def trained(folder: Path, beside: Callable[[PagedAdamW], None] | None) -> tuple[list[Parameter], list[list[float]]]:
    """Parameters after STEPS, each with gradients of one: so all first moments of a step are the same number."""
    folder.mkdir()
    params = [Parameter(torch.zeros(30_000)) for _ in range(6)]
    optimizer = PagedAdamW(params, lr=1e-2, **paging("all-in-file", folder))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    seen: list[Any] = []
    done = threading.Event()

    def again_and_again() -> None:
        while not done.is_set():
            seen.append(beside(optimizer))  # type: ignore[misc]

    thread = threading.Thread(target=again_and_again)
    if beside is not None:
        thread.start()
    for _ in range(STEPS):
        optimizer.step()
    done.set()
    if beside is not None:
        thread.join()
    return params, seen


@pytest.mark.parametrize("save", [save_to_file, make_state_dict])
def test_a_save_beside_steps_disturbs_no_step_and_sees_whole_ones(
    save: Callable[[PagedAdamW, Path], list[float]], tmp_path: Path
) -> None:
    expected, _ = trained(tmp_path / "alone", None)
    params, seen = trained(tmp_path / "beside", lambda optimizer: save(optimizer, tmp_path))  # type: ignore[arg-type]
    assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))
    assert len(seen) > 1
    assert all(len(moments) == 6 and len(set(moments)) == 1 for moments in seen)
