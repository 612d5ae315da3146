"""PagedAdamW in several threads: one saves while another steps."""

from __future__ import annotations

import os
import signal
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
    try:
        for _ in range(STEPS):
            optimizer.step()
    finally:
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


def test_a_closure_may_wait_for_another_thread_that_saves(tmp_path: Path) -> None:
    p = Parameter(torch.ones(10))
    optimizer = PagedAdamW([p])
    p.grad = torch.ones_like(p)

    def closure() -> float:
        thread = threading.Thread(target=optimizer.save_states, args=[tmp_path / "states"], daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert (tmp_path / "states").exists()


def test_a_fork_does_not_wait_for_a_thread_that_it_does_not_have(tmp_path: Path) -> None:
    params = [Parameter(torch.ones(10))]
    optimizer = PagedAdamW(params, **paging("all-in-file", tmp_path))
    params[0].grad = torch.ones(10)
    optimizer.step()
    inside, leave = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        leave.wait(60)

    last = optimizer.register_state_dict_pre_hook(hold)
    thread = threading.Thread(target=optimizer.state_dict)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            optimizer.step()
        except RuntimeError as error:
            os._exit(0 if "got a fork of it" in str(error) else 1)
        os._exit(2)
    status = os.waitpid(child, 0)[1]
    last.remove()
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
