"""PagedAdamW when something fails or is interrupted: what is undone, what stays, and what others keep in its state."""

from __future__ import annotations

import errno
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import largest_file
from optim_cases import GIVEN, KIB, as_torch, stepped
from torch.nn import Parameter

from qlora_ext import PagedAdamW


def fail(*_: Any) -> None:
    raise OSError(errno.EIO, "read")


def test_interrupted_after_the_pages_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step has been done, and autograd and the next step know."""
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = PagedAdamW([p])
    step, before = optimizer._paged.step, p._version

    def interrupted(*args: Any) -> None:
        step(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._paged, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert p._version > before
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_a_first_step_that_fails_leaves_what_others_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = PagedAdamW([p])
    optimizer.state[p]["mine"] = 1
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._paged, "step", fail)
        with pytest.raises(OSError, match="read"):
            optimizer.step()
    assert optimizer.state[p] == {"mine": 1}


def test_what_others_keep_stays_beside_given_states() -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = PagedAdamW([p])
    optimizer.state[p] = {**GIVEN, "mine": 1}
    optimizer.step()
    assert optimizer.state[p]["mine"] == 1
    optimizer.release()
    assert not optimizer.state


def test_a_load_that_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, optimizer = stepped()
    optimizer.save_states(tmp_path / "states")
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._paged, "_load", fail)
        with pytest.raises(OSError, match="read"):
            optimizer.load_states(tmp_path / "states")
    with pytest.raises(RuntimeError, match="could not be loaded"):
        optimizer.step()
    optimizer.load_states(tmp_path / "states")
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_a_load_that_finds_no_room_after_one_that_failed_makes_nothing_good(monkeypatch: pytest.MonkeyPatch) -> None:
    p, frozen = Parameter(torch.ones(1000)), Parameter(torch.ones(50_000), requires_grad=False)
    p.grad = torch.ones(1000)
    optimizer = PagedAdamW([p, frozen], page_bytes=4 * KIB, host_budget=16 * KIB)
    optimizer.step()
    saved = optimizer.state_dict()
    large = {"step": torch.tensor(1.0), "exp_avg": torch.ones(50_000), "exp_avg_sq": torch.ones(50_000)}
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._paged, "_load", fail)
        with pytest.raises(OSError, match="read"):
            optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="budgets without page_file"):
        optimizer.load_state_dict(saved | {"state": {**saved["state"], 1: large}})
    with pytest.raises(RuntimeError, match="could not be loaded"):
        optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_a_load_has_no_second_copy_of_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()
    saved, before = optimizer.state_dict(), weakref.ref(*optimizer._paged._stores.values())
    load, kept = optimizer._paged._load, []

    def watched(*args: Any) -> None:
        kept.append(before())
        load(*args)

    monkeypatch.setattr(optimizer._paged, "_load", watched)
    optimizer.load_state_dict(saved)
    assert kept == [None]


def test_a_group_that_cannot_be_removed_stays() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = PagedAdamW([{"params": [p]}, {"params": [q]}])
    optimizer.state[p] = GIVEN | {"exp_avg": torch.ones(9)}
    with pytest.raises(ValueError, match="exp_avg of parameter 0"):
        optimizer.remove_param_group(1)
    assert [group["params"] for group in optimizer.param_groups] == [[p], [q]]


def test_states_of_a_removed_group_go_at_once() -> None:
    p, q = Parameter(torch.ones(5000)), Parameter(torch.ones(5000))
    optimizer = PagedAdamW([{"params": [p]}, {"params": [q]}], page_bytes=4 * KIB)
    assert optimizer.stats()["unwritten_pages"] == 20
    optimizer.remove_param_group(1)
    assert optimizer.stats()["unwritten_pages"] == 10


def test_a_new_group_gets_the_room_of_one_that_was_removed() -> None:
    p, q = Parameter(torch.ones(1000)), Parameter(torch.ones(1000))
    optimizer = PagedAdamW([{"params": [p]}, {"params": [q]}], page_bytes=4 * KIB, host_budget=16 * KIB)
    p.grad = q.grad = torch.ones(1000)
    optimizer.step()
    del optimizer.param_groups[1]
    optimizer.add_param_group({"params": [Parameter(torch.ones(1000))]})
    assert optimizer.stats()["pages"]["host"] == optimizer.stats()["unwritten_pages"] == 2


def test_a_new_group_gets_the_place_of_one_that_was_removed_on_a_full_disk(tmp_path: Path) -> None:
    p, q = Parameter(torch.ones(1000)), Parameter(torch.ones(1000))
    optimizer = PagedAdamW(
        [{"params": [p]}, {"params": [q]}], page_bytes=4 * KIB, host_budget=0, page_file=tmp_path / "pages"
    )
    p.grad = q.grad = torch.ones(1000)
    optimizer.step()
    del optimizer.param_groups[1]
    with largest_file((tmp_path / "pages").stat().st_size):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1000))]})
        with pytest.raises(OSError, match="File too large"):
            optimizer.add_param_group({"params": [Parameter(torch.ones(1000))]})
    assert optimizer.stats()["pages"]["file"] == optimizer.stats()["unwritten_pages"] == 2


def test_a_closure_is_called_first_and_with_gradients() -> None:
    def run(make: Any) -> list[Any]:
        p = Parameter(torch.ones(3))
        optimizer = make([p], lr=0.1)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        return [*(optimizer.step(closure).item() for _ in range(3)), p.detach()]

    as_torch(run)


@pytest.mark.parametrize("found", [2.0, torch.nan])
def test_found_inf_is_a_sum_over_devices(found: float) -> None:
    p, optimizer = stepped()
    before = p.detach().clone()
    optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(p, before)


def test_a_gradient_whose_parameter_was_given_another_shape() -> None:
    p = Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = PagedAdamW([p])
    p.data = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"gradient of parameter 0: expected shape \[3, 2\], got \[2, 3\]"):
        optimizer.step()


def test_a_dimension_of_one_may_have_any_stride() -> None:
    def run(make: Any) -> torch.Tensor:
        p = Parameter(torch.randn(24).as_strided((4, 1, 6), (1, 0, 4)))
        p.grad = torch.randn(4, 1, 6)
        make([p], lr=0.1).step()
        return p.detach()

    as_torch(run)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_steps_have_torchs_dtype_for_each_default(dtype: torch.dtype, expected: torch.dtype) -> None:
    _, optimizer = stepped()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(70001.0)
    optimizer.load_state_dict(saved)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        step = optimizer.state_dict()["state"][0]["step"]
    finally:
        torch.set_default_dtype(default)
    assert (step.dtype, step.item()) == (expected, 70001)
