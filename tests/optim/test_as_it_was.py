"""PagedAdamW leaves no trace of what it refuses or what has gone, and loses nothing that it need not lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import KIB, as_torch, bits, state_bits, stepped
from torch.nn import Parameter
from torch.optim import AdamW

from qlora_ext import PagedAdamW


def test_what_a_hook_writes_that_removes_itself_is_kept() -> None:
    def run(make: Any) -> tuple[torch.Tensor, torch.Tensor]:
        p = Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = make([p], lr=0.1)
        optimizer.step()

        def once(of: Any) -> None:
            of.state[p]["exp_avg"] = torch.zeros(3)
            handle.remove()

        handle = optimizer.register_state_dict_pre_hook(once)
        optimizer.state_dict()
        written = optimizer.state_dict()["state"][0]["exp_avg"].clone()
        optimizer.step()
        return written, p.detach()

    as_torch(run)


@pytest.mark.parametrize("released", [False, True])
def test_the_last_group_leaves_no_state(released: bool) -> None:
    p = Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    optimizer = PagedAdamW([p], page_bytes=4 * KIB)
    if released:
        optimizer.step()
        optimizer.release()
    optimizer.remove_param_group(0)
    assert sum(optimizer.stats()["pages"].values()) + optimizer.stats()["unwritten_pages"] == 0
    optimizer.add_param_group({"params": [p]})
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_states_that_find_no_room_leave_the_old_ones() -> None:
    p, frozen = Parameter(torch.ones(1000)), Parameter(torch.ones(50_000), requires_grad=False)
    p.grad = torch.ones(1000)
    optimizer = PagedAdamW([p, frozen], lr=0.1, page_bytes=4 * KIB, host_budget=16 * KIB)
    optimizer.step()
    states = state_bits(optimizer)
    of_torch = AdamW([Parameter(torch.ones(1000)), Parameter(torch.ones(50_000))], lr=0.5)
    for group in of_torch.param_groups:
        for each in group["params"]:
            each.grad = torch.ones_like(each)
    of_torch.step()
    with pytest.raises(ValueError, match="budgets without page_file"):
        optimizer.load_state_dict(of_torch.state_dict())
    assert state_bits(optimizer) == states
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_states_for_another_device_leave_the_old_ones_beside_a_page_file(tmp_path: Path) -> None:
    p, there = Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"), requires_grad=False)
    p.grad = torch.ones(3)
    optimizer = PagedAdamW([p, there], page_file=tmp_path / "pages")
    optimizer.step()
    states, saved = state_bits(optimizer), optimizer.state_dict()
    there.requires_grad_()
    with pytest.raises(ValueError, match="expected parameters on one device"):
        optimizer.load_state_dict(saved)
    assert state_bits(optimizer) == states


def test_what_a_step_needs_is_there_when_it_is_prepared(tmp_path: Path) -> None:
    p = Parameter(torch.ones(10_000))
    optimizer = PagedAdamW([p], page_bytes=4 * KIB, host_budget=0, page_file=tmp_path / "pages")
    assert (optimizer.stats()["ring_pages"], optimizer.stats()["unwritten_pages"]) == (0, 20)
    states = optimizer._paged._states[p]
    optimizer._paged._stores[states.device].prepare([states.id])
    assert (optimizer.stats()["ring_pages"], optimizer.stats()["unwritten_pages"]) == (2, 0)


def test_another_shape_of_the_same_size_is_refused() -> None:
    p = Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = PagedAdamW([p])
    optimizer.step()
    p.grad = None
    p.data = torch.ones(3, 2)
    p.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"expected shape \[2, 3\], as when added, got \[3, 2\]"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(5,), (2,), (3, 1)])
def test_a_parameter_may_change_before_its_first_step(shape: tuple[int, ...]) -> None:
    def run(make: Any) -> torch.Tensor:
        p = Parameter(torch.ones(3))
        optimizer = make([p], lr=0.1)
        p.data = torch.ones(shape)
        p.grad = torch.ones(shape)
        optimizer.step()
        return p.detach()

    as_torch(run)


def test_a_device_without_parameters_counts_no_more(tmp_path: Path) -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = PagedAdamW([p], page_file=tmp_path / "pages")
    optimizer.step()
    optimizer.remove_param_group(0)
    with pytest.raises(ValueError, match="expected parameters with values"):  # of one on meta, not of two devices
        optimizer.add_param_group({"params": [Parameter(torch.ones(3, device="meta"))]})
    assert not (tmp_path / "pages").exists()  # it would be in the other device's way
    optimizer.add_param_group({"params": [p]})
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_no_device_takes_a_step_that_another_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices, of which only one is here: the other one's store says that it has no memory."""
    p, optimizer = stepped()

    class Full:
        def prepare(self, ids: list[int]) -> None:
            raise RuntimeError("no memory")

    paged = optimizer._paged
    before, states = bits([p]), state_bits(optimizer)
    step, elsewhere = paged.step, Parameter(torch.ones(3, device="meta"))
    there = torch.device("meta")

    def with_another(updates: list[Any], *how: Any) -> None:
        paged._stores[there] = Full()  # type: ignore[assignment]
        paged._states[elsewhere] = type(paged._states[p])(there, 0, elsewhere.shape)
        another = updates[0]._replace(parameter=elsewhere, local=elsewhere)
        step([*updates, another], *how)

    monkeypatch.setattr(paged, "step", with_another)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    monkeypatch.undo()
    del paged._stores[there], paged._states[elsewhere]
    assert (bits([p]), state_bits(optimizer)) == (before, states)


def test_a_state_dict_made_in_inference_mode_trains_on() -> None:
    p, optimizer = stepped()
    with torch.inference_mode():
        saved = optimizer.state_dict()
    other = AdamW([p], lr=0.1)
    other.load_state_dict(saved)
    other.step()
    assert other.state_dict()["state"][0]["step"] == 2


def test_differentiable_is_refused_as_amsgrad_is() -> None:
    p, optimizer = stepped()
    saved = AdamW([p], differentiable=True).state_dict()
    with pytest.raises(ValueError, match="differentiable: expected False, got True"):
        optimizer.load_state_dict(saved)
