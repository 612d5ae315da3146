"""PagedAdamW where programs do to an optimizer and its parameters what torch.optim.AdamW allows beside step()."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optim_cases import KIB
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.testing._internal.two_tensor import TwoTensor

from qlora_ext import PagedAdamW
from qlora_ext.optim_state import shard_number

LR = 0.1
both = pytest.mark.parametrize("shape", [(5000,), (70, 90)], ids=str)


def as_torch(run: Callable[[Callable[..., Optimizer]], Any]) -> None:
    """What `run` gives with each optimizer is the same."""
    torch.manual_seed(0)
    got = run(PagedAdamW)
    torch.manual_seed(0)
    # Torch's fused kernel mistakes the order of strided parameters.
    torch.testing.assert_close(got, run(lambda *a, **k: AdamW(*a, foreach=False, **k)), rtol=1e-5, atol=1e-6)


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


def test_backward_through_what_a_step_has_changed_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = PagedAdamW(model.parameters(), lr=LR)
    y = model(torch.randn(8, 4))
    y.mean().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.square().mean().backward()


ODD_GRADIENTS = {
    "negated": torch._neg_view(torch.full((4, 30), -2.0)),
    "expanded": torch.ones(30, 1).expand(30, 4).t(),
    "zero": torch._efficientzerotensor(4, 30),
}


@pytest.mark.parametrize("grad", ODD_GRADIENTS.values(), ids=ODD_GRADIENTS)
def test_gradients_that_do_not_lie_in_memory_as_they_are(grad: Tensor) -> None:
    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.ones(4, 30))
        p.grad = grad
        make([p], lr=LR).step()
        return p.detach()

    as_torch(run)


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "in a file"])
@pytest.mark.parametrize("order", [1, -1], ids=["weight first", "transpose first"])
def test_a_weight_and_its_transpose(order: int, paged: bool, tmp_path: Path) -> None:
    paging: dict[str, Any] = {"page_bytes": 8 * KIB, "host_budget": 0, "page_file": tmp_path / "pages"} if paged else {}

    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.randn(300, 70))
        transposed = Parameter(p.data.t())
        optimizer = make([p, transposed][::order], lr=LR, weight_decay=0.5, **(paging if make is PagedAdamW else {}))
        for _ in range(3):
            p.grad, transposed.grad = torch.randn(300, 70), torch.randn(70, 300)
            optimizer.step()
        return p.detach()

    as_torch(run)


def test_strided_parameters_of_any_shape() -> None:
    def run(make: Callable[..., Optimizer]) -> list[Tensor]:
        base = torch.randn(7, 6, 5, 41)
        params = [
            Parameter(p)
            for p in (base[:3].to(memory_format=torch.channels_last), base[3:5].transpose(0, 3), base[5:, :, 1:4, ::2])
        ]
        optimizer = make(params, lr=LR, **({"page_bytes": 4 * KIB} if make is PagedAdamW else {}))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return [p.detach() for p in params]

    as_torch(run)


def test_wrapped_tensors_are_refused() -> None:
    p, wrapped = Parameter(torch.ones(10)), TwoTensor(torch.ones(10), torch.ones(10))
    with pytest.raises(TypeError, match=r"params: expected plain tensors .*, got 'TwoTensor'"):
        PagedAdamW([Parameter(wrapped)])
    optimizer = PagedAdamW([p])
    p.grad = wrapped
    with pytest.raises(TypeError, match=r"gradient of parameter 0: expected plain tensors .*, got 'TwoTensor'"):
        optimizer.step()


@both
def test_states_put_into_state_are_taken_over(shape: tuple[int, ...]) -> None:
    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.ones(shape))
        optimizer = make([p], lr=LR)
        optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape)}
        p.grad = torch.ones(shape)
        optimizer.step()
        return p.detach()

    as_torch(run)


RESETS: dict[str, Callable[[Any, Tensor], object]] = {
    "all": lambda optimizer, p: setattr(optimizer, "state", defaultdict(dict)),
    "emptied": lambda optimizer, p: optimizer.state[p].clear(),
    "an empty one": lambda optimizer, p: optimizer.state.update({p: {}}),
    "deleted": lambda optimizer, p: optimizer.state.pop(p),
}


@both
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
def test_states_taken_out_of_state_begin_anew(reset: Callable[..., object], shape: tuple[int, ...]) -> None:
    def run(make: Callable[..., Optimizer]) -> tuple[Tensor, Tensor]:
        p = Parameter(torch.ones(shape))
        optimizer = make([p], lr=LR)
        assert len(optimizer.state[p]) == 0  # which leaves an empty entry there
        for step in range(6):
            if step == 2:
                reset(optimizer, p)
            p.grad = torch.full(shape, float(step - 3))
            optimizer.step()
        return p.detach(), optimizer.state_dict()["state"][0]["step"]

    as_torch(run)


def test_what_others_keep_in_state_stays() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[p]["slow"] = slow = torch.ones(3)
    optimizer.state_dict()
    assert optimizer.state[p]["slow"] is slow
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_names_of_another_parameter_are_no_state() -> None:
    p, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    p.grad = other.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = other
    optimizer.state[other] = optimizer.state.pop(p)
    with pytest.raises(ValueError, match=r"state of parameter 0: expected tensors, .*, got the names of another"):
        optimizer.step()


def test_a_state_without_steps_is_saved_as_none() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == {}


def test_bad_states_in_state_change_nothing() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    optimizer.state[p] = {"step": 1, "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(3)}
    p.grad = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"PagedAdamW.state: exp_avg of parameter 0: expected floats \[3\], got floats \[4\]"
    ):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_flattened_state_dicts_of_distributed_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    again = copy.deepcopy(model)
    optimizer, loaded = (PagedAdamW(m.parameters(), lr=LR) for m in (model, again))
    model(torch.randn(8, 4)).mean().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_optimizer_state_dict(again, loaded, flat, options=options)
    for got, expected in zip(*(o.state_dict()["state"].values() for o in (loaded, optimizer)), strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_empty_states_are_none() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: {}}})
    assert optimizer.state_dict()["state"] == {}


def test_saving_writes_through_a_link_and_refuses_what_no_file_holds(tmp_path: Path) -> None:
    optimizer = PagedAdamW([{"params": [Parameter(torch.ones(3))], "note": "text"}])
    (tmp_path / "link").symlink_to(tmp_path / "states")
    optimizer.save_states(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    optimizer.load_states(tmp_path / "states")
    assert optimizer.param_groups[0]["note"] == "text"
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(TypeError, match=r"save_states: param_groups: expected what JSON has, got .*object"):
        optimizer.save_states(tmp_path / "states")


def test_an_eps_that_rounds_to_nothing_makes_no_nan() -> None:
    p = Parameter(torch.ones(300))
    p.grad = torch.zeros(300)
    PagedAdamW([p], eps=1e-45, weight_decay=0).step()
    assert torch.equal(p, torch.ones(300))


def test_each_shard_has_its_number() -> None:
    def number(placements: list[Any], shape: tuple[int, ...], coordinate: list[int]) -> int:
        mesh = SimpleNamespace(shape=shape, get_coordinate=lambda: coordinate)
        return shard_number(SimpleNamespace(placements=placements, device_mesh=mesh))

    assert shard_number(Parameter(torch.ones(3))) == 0
    assert [number([Shard(0)], (4,), [i]) for i in range(4)] == [0, 1, 2, 3]
    assert [number([Replicate(), Shard(0)], (2, 2), [i, j]) for i in range(2) for j in range(2)] == [0, 1, 0, 1]
    assert [number([Shard(1), Shard(0)], (2, 3), [i, j]) for i in range(2) for j in range(3)] == list(range(6))


def test_a_failed_constructor_leaves_no_page_file(tmp_path: Path) -> None:
    file = tmp_path / "pages"
    with pytest.raises(TypeError, match="params") as kept:
        PagedAdamW([{"params": [Parameter(torch.ones(9))]}, {"params": [Parameter(torch.ones(9).double())]}],
                   host_budget=0, page_file=file)  # fmt: skip
    assert not file.exists(), kept
    PagedAdamW([Parameter(torch.ones(9))], host_budget=0, page_file=file)


RUNNING_THREAD = """
import sys, threading, time, torch
from qlora_ext import PagedAdamW
optimizer = PagedAdamW([torch.nn.Parameter(torch.ones(9))], host_budget=0, page_file=sys.argv[1])
threading.Thread(target=lambda: time.sleep(60), daemon=True).start()
"""


def test_the_page_file_goes_though_a_thread_still_runs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", RUNNING_THREAD, str(tmp_path / "pages")], check=True, timeout=300)
    assert not (tmp_path / "pages").exists()


STRIDED = """
import re, sys, torch
from pathlib import Path
from qlora_ext import PagedAdamW
def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
params = [torch.nn.Parameter(torch.randn(64, 64, 32, 32).to(memory_format=torch.channels_last)) for _ in range(2)]
for p in params:
    p.grad = torch.ones_like(p)
optimizer = PagedAdamW(params, host_budget=0, page_file=sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
before = resident("VmRSS")
optimizer.step()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_strided_parameters(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STRIDED, str(tmp_path / "pages")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown <= 16 << 20  # of 64 MiB: two pages, the elements for one, and what a first step needs of the libraries
