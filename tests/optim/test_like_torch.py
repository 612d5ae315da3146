"""What programs written for torch.optim.AdamW do with it: schedules, hooks, distributed checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Linear, Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from qlora_ext import PagedAdamW

Make = Callable[..., Optimizer]


def parameter() -> Parameter:
    p = Parameter(torch.ones(3))
    p.grad = torch.tensor([0.1, -0.2, 0.3])
    return p


def follow(make: Make, schedule: Callable[[Optimizer], Any], steps: int) -> tuple[Parameter, Optimizer]:
    p = parameter()
    optimizer = make([p], lr=0.1)
    scheduler = schedule(optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return p, optimizer


def to_zero(optimizer: Optimizer) -> LinearLR:
    """Its last rates are a little below 0."""
    return LinearLR(optimizer, start_factor=0.1, end_factor=0.0, total_iters=100)


@pytest.mark.parametrize("schedule", [to_zero, lambda o: LambdaLR(o, lambda epoch: 1 - epoch / 70)], ids=["0", "below"])
def test_schedules_may_go_below_zero(schedule: Callable[[Optimizer], Any]) -> None:
    (p, paged), (expected, optimizer) = (follow(make, schedule, 103) for make in (PagedAdamW, AdamW))
    assert paged.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0
    torch.testing.assert_close(p, expected, rtol=1e-6, atol=0)


def test_what_a_schedule_has_left_is_loaded(tmp_path: Path) -> None:
    p, optimizer = follow(PagedAdamW, to_zero, 100)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.save_states(tmp_path / "states")
    optimizer.load_states(tmp_path / "states")
    assert optimizer.param_groups[0]["lr"] < 0
    with pytest.raises(ValueError, match="lr: expected 0 or more"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "lr": -0.1})
    before = p.detach().clone()
    for bad in (float("nan"), -float("inf")):
        optimizer.param_groups[0]["lr"] = bad
        with pytest.raises(ValueError, match=f"lr: expected 0 or more, got {bad}"):
            optimizer.step()
    assert torch.equal(p, before)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_groups_have_what_those_of_adamw_have() -> None:
    p = parameter()
    optimizer = PagedAdamW([p], lr=0.1)
    expected = AdamW([p], lr=0.1).param_groups[0]
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    older = optimizer.state_dict()
    older["param_groups"] = [{name: older["param_groups"][0][name] for name in ("params", "lr", "betas", "eps")}]
    older["param_groups"][0]["weight_decay"] = 0.01
    optimizer.load_state_dict(older)
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("first", "second"), [(PagedAdamW, AdamW), (AdamW, PagedAdamW), (PagedAdamW, PagedAdamW)])
def test_distributed_checkpoints(first: Make, second: Make, flat: bool, tmp_path: Path) -> None:
    model, options = Linear(3, 2), StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = first(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
    optimizer = second(model.parameters(), lr=0.2)
    wanted = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(wanted, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, optimizer, wanted["optimizer"], options=options)
    assert optimizer.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(optimizer.state_dict()["state"], expected, rtol=0, atol=0)


# --- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_hook_before_state_dict_writes_counts(in_place: bool) -> None:
    results = []
    for make in (PagedAdamW, AdamW):
        p = parameter()
        optimizer = make([p], lr=0.1, weight_decay=0.0)
        optimizer.step()

        def forget(optimizer: Optimizer, p: Parameter = p) -> None:
            if in_place:
                optimizer.state[p]["exp_avg"].zero_()
            else:
                optimizer.state[p]["exp_avg"] = torch.zeros(3)
            optimizer.state["mine"] = 1

        handle = optimizer.register_state_dict_pre_hook(forget)
        saved = optimizer.state_dict()
        handle.remove()
        assert not saved["state"][0]["exp_avg"].any()
        assert optimizer.state["mine"] == 1
        p.grad = torch.zeros(3)
        optimizer.step()
        assert not optimizer.state_dict()["state"][0]["exp_avg"].any()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def slower(_: Optimizer, given: dict[str, Any]) -> None:
    given["param_groups"] = [group | {"lr": group["lr"] / 2} for group in given["param_groups"]]


@pytest.mark.parametrize("make", [PagedAdamW, AdamW])
def test_hooks_before_load_state_dict(make: Make) -> None:
    """Each once a call, on a dict of their own, and those that come or go meanwhile do."""
    optimizer = make([parameter()], lr=0.1)
    saved = optimizer.state_dict()

    def rates(times: int) -> list[float]:
        return [load(optimizer, saved) for _ in range(times)]

    handles = [optimizer.register_load_state_dict_pre_hook(slower) for _ in range(2)]
    assert rates(2) == [0.025, 0.025]
    assert saved["param_groups"][0]["lr"] == 0.1
    post = optimizer.register_load_state_dict_post_hook(lambda _: handles[0].remove())
    assert rates(2) == [0.025, 0.05]
    post.remove()
    post = optimizer.register_load_state_dict_post_hook(lambda o: o.register_load_state_dict_pre_hook(slower))
    assert rates(3) == [0.05, 0.025, 0.0125]
    optimizer.register_load_state_dict_pre_hook(lambda _, given: given | {"param_groups": saved["param_groups"]})
    assert rates(1) == [0.1]


def load(optimizer: Optimizer, saved: dict[str, Any]) -> float:
    optimizer.load_state_dict(saved)
    return optimizer.param_groups[0]["lr"]


def test_a_hook_before_load_state_dict_may_remove_itself() -> None:
    optimizer = PagedAdamW([parameter()], lr=0.1)
    saved, calls = optimizer.state_dict(), []

    def once(_: Optimizer, given: dict[str, Any]) -> None:
        calls.append(len(given["param_groups"]))
        handle.remove()

    handle = optimizer.register_load_state_dict_pre_hook(once)
    optimizer.register_load_state_dict_pre_hook(slower)
    assert [load(optimizer, saved) for _ in range(2)] == [0.05, 0.05]
    assert calls == [1]


def test_what_a_hook_after_state_dict_writes_stays() -> None:
    optimizer = PagedAdamW([parameter()], lr=0.1)
    optimizer.register_state_dict_post_hook(lambda o, _: o.state.update(mine=1))
    optimizer.state_dict()
    optimizer.step()
    assert optimizer.state["mine"] == 1


def test_a_lazy_module_has_to_run_first() -> None:
    model = torch.nn.LazyLinear(2)
    with pytest.raises(ValueError, match="expected parameters with values, got 'one of a lazy module"):
        PagedAdamW(model.parameters())
    model(torch.ones(1, 3))
    PagedAdamW(model.parameters())
