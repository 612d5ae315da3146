"""Parameter groups of PagedAdamW that are added, removed and made anew: as torch has it, and no page is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optim_cases import KIB, as_torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from qlora_ext import PagedAdamW

LR = 0.1


def test_a_parameter_may_change_its_group() -> None:
    def run(make: Callable[..., Optimizer]) -> Tensor:
        p, other = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
        optimizer = make([{"params": [other]}, {"params": [p]}], lr=LR)
        for _ in range(5):
            p.grad = torch.ones(3)
            optimizer.step()
        optimizer.param_groups.pop(1)
        optimizer.add_param_group({"params": [p], "lr": LR / 2})
        optimizer.load_state_dict(optimizer.state_dict())
        p.grad = -torch.ones(3)
        optimizer.step()
        return p.detach()

    as_torch(run)


@pytest.mark.parametrize("how", ["all again", "split", "states first"])
def test_groups_may_be_made_anew_one_by_one(how: str) -> None:
    def run(make: Callable[..., Optimizer]) -> list[Tensor]:
        params = [Parameter(torch.zeros(3)) for _ in range(3)]
        optimizer = make([{"params": [p]} for p in params], lr=LR)

        def step(grad: float) -> None:
            for p in params:
                p.grad = torch.full((3,), grad)
            optimizer.step()

        for _ in range(5):
            step(1.0)
        if how == "states first":
            states = {params[i]: state for i, state in optimizer.state_dict()["state"].items()}
            optimizer = make(params[:1], lr=LR)
            optimizer.state.update(states)
        else:
            optimizer.param_groups.clear()
            optimizer.add_param_group({"params": params[:1], "lr": LR})
        for group in [[p] for p in params[1:]] if how == "all again" else [params[1:]]:
            optimizer.add_param_group({"params": group, "lr": LR / 2})
        step(-1.0)
        return [p.detach() for p in params]

    as_torch(run)


@pytest.mark.parametrize("method", [True, False], ids=["remove_param_group", "del"])
def test_groups_that_come_and_go_leave_no_pages(method: bool) -> None:
    p = Parameter(torch.zeros(1000))
    optimizer = PagedAdamW([p], page_bytes=4096)
    pages = []
    for _ in range(5):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(10_000))]})
        if method:
            optimizer.remove_param_group(-1)
        else:
            del optimizer.param_groups[-1]
        p.grad = torch.ones_like(p)
        optimizer.step()
        stats = optimizer.stats()
        pages.append((stats["pages"]["host"], stats["unwritten_pages"], len(optimizer._paged._states)))
    assert set(pages) == {(2, 0, 1)}


def test_a_parameter_twice_in_the_groups_is_refused() -> None:
    p, q = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    optimizer = PagedAdamW([{"params": [p]}, {"params": [q]}])
    optimizer.param_groups[1]["params"].append(p)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="PagedAdamW: params: expected each parameter once"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(3))


def test_changing_groups_takes_no_pages() -> None:
    p = Parameter(torch.zeros(100_000))
    optimizer = PagedAdamW([p], page_bytes=64 * KIB, host_budget=1 << 20)
    pages = []
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
        pages.append(optimizer.stats()["pages"]["host"])
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": [p]})
    assert set(pages) == {13}


def test_what_save_states_writes_of_a_group_and_what_stays_of_ones_own(tmp_path: Path) -> None:
    p = Parameter(torch.ones(3))
    PagedAdamW([{"params": [p], "initial_lr": 0.25}], lr=0.5, betas=(0.5, 0.75)).save_states(tmp_path / "states")
    named = PagedAdamW([("weight", p)], lr=LR)
    named.load_states(tmp_path / "states")
    (group,) = named.param_groups
    assert (group["lr"], group["betas"], group["initial_lr"]) == (0.5, (0.5, 0.75), 0.25)
    assert group["param_names"] == ["weight"]


def test_parameters_of_two_devices_share_no_page_file(tmp_path: Path) -> None:
    here, there = Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"))
    expected = r"page_file: expected parameters on one device, got \['cpu', 'meta'\]"
    with pytest.raises(ValueError, match=expected):
        PagedAdamW([here, there], page_file=tmp_path / "pages")
    optimizer = PagedAdamW([here], page_file=tmp_path / "pages")
    with pytest.raises(ValueError, match=expected):
        optimizer.add_param_group({"params": [there]})


def test_what_others_keep_of_a_removed_parameter_goes() -> None:
    frozen = Parameter(torch.ones(3), requires_grad=False)
    optimizer = PagedAdamW([{"params": [Parameter(torch.ones(3))]}, {"params": [frozen]}])
    optimizer.state[frozen]["mine"] = 1
    del optimizer.param_groups[1]
    assert optimizer.state_dict()["state"] == {}
