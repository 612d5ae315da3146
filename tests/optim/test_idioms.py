"""PagedAdamW where programs do to an optimizer and its parameters what torch.optim.AdamW allows beside step()."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_disk import largest_file
from optim_cases import KIB, as_torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.two_tensor import TwoTensor

from qlora_ext import PagedAdamW
from qlora_ext.sharded import is_sharded, shard_number

LR = 0.1


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


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "in a file"])
def test_two_parameters_of_the_same_memory(paged: bool, tmp_path: Path) -> None:
    """Both contiguous, and each in one page: threads would lose updates of one or the other."""
    paging: dict[str, Any] = {"host_budget": 0, "page_file": tmp_path / "pages"} if paged else {}

    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.randn(512, 256))
        flat = Parameter(p.data.view(-1))
        optimizer = make([p, flat], lr=LR, weight_decay=0.5, **(paging if make is PagedAdamW else {}))
        for _ in range(10):
            p.grad, flat.grad = torch.randn(512, 256), torch.randn(512 * 256)
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


def like_dtensor(placements: list[Any], shape: tuple[int, ...], coordinate: list[int] | None) -> Any:
    """As on one of several processes."""
    mesh = SimpleNamespace(shape=shape, get_coordinate=lambda: coordinate)
    return SimpleNamespace(placements=placements, device_mesh=mesh, full_tensor=None)


def test_each_shard_has_its_number() -> None:
    def number(placements: list[Any], shape: tuple[int, ...], coordinate: list[int] | None) -> int:
        return shard_number(like_dtensor(placements, shape, coordinate))

    assert shard_number(Parameter(torch.ones(3))) == 0
    assert number([Shard(0)], (4,), None) == 0  # a process that is not in the mesh
    assert [number([Shard(0)], (4,), [i]) for i in range(4)] == [0, 1, 2, 3]
    assert [number([Replicate(), Shard(0)], (2, 2), [i, j]) for i in range(2) for j in range(2)] == [0, 1, 0, 1]
    assert [number([Shard(1), Shard(0)], (2, 3), [i, j]) for i in range(2) for j in range(3)] == list(range(6))


def test_parameters_and_shards_are_rounded_by_chances_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> list[Tensor]:
        params = [Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
        for p in params:
            p.grad = torch.ones_like(p)
        PagedAdamW(params, lr=1e-3, stochastic_rounding=True).step()
        return [p.detach() for p in params]

    first, second = step()
    assert not torch.equal(first, second)
    assert torch.equal(first, step()[0])
    monkeypatch.setattr("qlora_ext.optim.updates.shard_number", lambda p: 1)
    monkeypatch.setattr("qlora_ext._C.plain_gradients", lambda params: [None] * len(params))  # none is whole
    assert not torch.equal(first, step()[0])


def test_a_failed_constructor_leaves_no_page_file(tmp_path: Path) -> None:
    file = tmp_path / "pages"
    with pytest.raises(TypeError, match="params") as kept:
        PagedAdamW([{"params": [Parameter(torch.ones(9))]}, {"params": [Parameter(torch.ones(9).double())]}],
                   host_budget=0, page_file=file)  # fmt: skip
    assert not file.exists(), kept
    PagedAdamW([Parameter(torch.ones(9))], host_budget=0, page_file=file)


def test_parameters_that_find_no_room_leave_no_page_file(tmp_path: Path) -> None:
    frozen, file = Parameter(torch.ones(9), requires_grad=False), tmp_path / "pages"
    optimizer = PagedAdamW([frozen], host_budget=0, page_file=file)
    with largest_file(10_000), pytest.raises(OSError, match="File too large") as kept:
        optimizer.add_param_group({"params": [Parameter(torch.ones(9))]})
    assert not file.exists(), kept


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
    assert grown <= 16 << 20  # of 64 MiB: two pages, their elements, and what a first step needs of the libraries


def test_tensors_without_values_are_refused() -> None:
    p = Parameter(torch.zeros(3))
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    with FakeTensorMode():
        with pytest.raises(TypeError, match="exp_avg: expected a tensor with values, got 'FakeTensor'"):
            optimizer.state_dict()
        with pytest.raises(TypeError, match="params: expected a tensor with values, got 'FakeTensor'"):
            PagedAdamW([Parameter(torch.zeros(3))])


def test_a_default_device_is_not_where_states_are() -> None:
    p = Parameter(torch.zeros(3))
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    with torch.device("meta"):
        state = optimizer.state_dict()["state"][0]
    assert {value.device.type for value in state.values()} == {"cpu"}
    assert torch.equal(state["exp_avg"], torch.full((3,), 1 - 0.9))


def test_states_of_8_bits_of_a_shard_are_no_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their absmax would pass for that of every shard."""
    assert is_sharded(like_dtensor([Replicate(), Shard(0)], (2, 2), [0, 0]))
    assert not is_sharded(like_dtensor([Shard(0)], (1,), [0]))
    assert not is_sharded(like_dtensor([Replicate()], (2,), [0]))
    assert not is_sharded(torch.zeros(3))
    monkeypatch.setattr("qlora_ext.optim.paged_parameters.is_sharded", lambda p: True)
    small, large = Parameter(torch.zeros(3)), Parameter(torch.zeros(5000))
    optimizer = PagedAdamW([small, large], state_bits=8)
    small.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state_dict()["state"].keys() == {0}
    large.grad = torch.ones(5000)
    optimizer.step()
    with pytest.raises(ValueError, match="state_dict: expected 32-bit states of sharded DTensors, or save_states"):
        optimizer.state_dict()


def test_the_page_file_is_not_overwritten(tmp_path: Path) -> None:
    p = Parameter(torch.zeros(3))
    optimizer = PagedAdamW([p], host_budget=0, page_file=tmp_path / "pages")
    p.grad = torch.ones(3)
    optimizer.step()
    (tmp_path / "link").symlink_to(tmp_path / "pages")
    for path in (tmp_path / "pages", tmp_path / "link", os.fsencode(tmp_path / "pages")):
        with pytest.raises(ValueError, match="save_states: path: expected another file than page_file, got"):
            optimizer.save_states(path)
    assert optimizer.state_dict()["state"][0]["step"] == 1
