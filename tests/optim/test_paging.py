"""Where the states of PagedAdamW are and what moves, on the CPU and on a GPU; DTensor parameters."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optim_cases import KIB, bits, paging, parameters, set_gradients, state_bits, take_steps, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from qlora_ext import PagedAdamW

LR = 1e-2


def test_nothing_moves_while_everything_fits(tmp_path: Path) -> None:
    options = {"page_bytes": 8 * KIB, "host_budget": 512 * KIB, "page_file": tmp_path / "pages"}
    _, optimizer = train(partial(PagedAdamW, lr=LR, **options), 3)
    stats = optimizer.stats()
    assert stats["pages"]["host"] > 40
    assert (stats["pages"]["file"], stats["ring_pages"], stats["hit_rate"]) == (0, 0, 1.0)
    assert sum(stats["bytes_read"].values()) == sum(stats["bytes_written"].values()) == 0
    assert stats["visits"] == 3 * stats["pages"]["host"]


def test_stats_count_what_streams(tmp_path: Path) -> None:
    params = parameters()
    options = {"page_bytes": 8 * KIB, "host_budget": 200 * KIB, "page_file": tmp_path / "pages"}
    optimizer = PagedAdamW(params, lr=LR, **options)
    assert optimizer.stats()["unwritten_pages"] > 40
    assert optimizer.stats()["hit_rate"] == 1.0
    take_steps(params, optimizer, range(2))
    before = optimizer.stats()
    take_steps(params, optimizer, range(2, 5))
    after = optimizer.stats()
    at_home, in_file = after["pages"]["host"], after["pages"]["file"]
    ring = max(2, min(torch.get_num_threads(), 200 // 8 // 4))
    assert (at_home, after["ring_pages"], after["unwritten_pages"]) == (200 // 8 - ring, ring, 0)
    moved = 3 * in_file * 8 * KIB
    assert after["bytes_written"]["file"] - before["bytes_written"]["file"] == moved
    assert after["bytes_read"]["file"] - before["bytes_read"]["file"] == moved
    assert after["hits"] - before["hits"] == 3 * at_home
    assert after["hit_rate"] == pytest.approx(at_home / (at_home + in_file))


def test_stats_are_sums_over_devices(tmp_path: Path) -> None:
    """The second device is another optimizer's: most machines have one."""
    one, two = (train(partial(PagedAdamW, lr=LR, **paging("half", tmp_path)), steps)[1] for steps in (2, 3))
    alone = one.stats(), two.stats()
    one._paged._stores[torch.device("meta")] = two._paged._stores[torch.device("cpu")]
    both = one.stats()
    for name in ("visits", "hits", "unwritten_pages", "ring_pages", "seconds_waited"):
        assert both[name] == sum(stats[name] for stats in alone)
    for name in ("pages", "bytes_read", "bytes_written"):
        assert both[name] == {tier: sum(stats[name][tier] for stats in alone) for tier in ("device", "host", "file")}


MANY_STEPS = """
import torch
from qlora_ext import PagedAdamW
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.randn(40, 30).t()) for _ in range(3)]
for p in params:
    p.grad = torch.randn_like(p)
optimizer = PagedAdamW(params)
for _ in range(2000):
    optimizer.step()
with torch.inference_mode():  # in which all threads have to be
    params = [torch.nn.Parameter(torch.randn(40, 30).t()) for _ in range(20)]
    for p in params:
        p.grad = torch.randn_like(p)
    PagedAdamW(params).step()
"""


def test_threads_that_gather_do_not_wait_for_pages_that_do_not_come() -> None:
    subprocess.run([sys.executable, "-c", MANY_STEPS], timeout=300, check=True)


def test_frozen_parameters_take_no_pages(tmp_path: Path) -> None:
    """One that has had no gradient yet takes them."""
    p, idle = (Parameter(torch.ones(1000)) for _ in range(2))
    frozen = Parameter(torch.ones(100_000), requires_grad=False)
    optimizer = PagedAdamW([p, frozen, idle], page_bytes=4 * KIB)
    pages = optimizer.stats()["unwritten_pages"]
    take_steps([p], optimizer, range(1))
    optimizer.save_states(tmp_path / "states")
    optimizer.load_states(tmp_path / "states")
    assert pages == sum(optimizer.stats()["pages"].values()) + optimizer.stats()["unwritten_pages"] == 4


def test_release_frees_all_and_a_step_after_it_begins_anew(tmp_path: Path) -> None:
    options = {"page_bytes": 8 * KIB, "host_budget": 64 * KIB, "page_file": tmp_path / "pages"}
    params, optimizer = train(partial(PagedAdamW, lr=LR, **options), 2)
    assert (tmp_path / "pages").exists()
    optimizer.release()
    assert not (tmp_path / "pages").exists()
    assert optimizer.state_dict()["state"] == {}
    again = [Parameter(p.detach().clone()) for p in params]
    take_steps(params, optimizer, range(2, 4))
    take_steps(again, PagedAdamW(again, lr=LR), range(2, 4))
    assert bits(params) == bits(again)


def test_dtensor_parameters_are_updated_and_saved(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = parameters()[:3]
        sharded = [Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
        optimizers = [PagedAdamW(params, lr=LR) for params in (plain, sharded)]
        theirs = torch.optim.AdamW(sharded, lr=LR)
        for step in range(3):
            set_gradients(plain, step)
            for p, q in zip(sharded, plain, strict=True):
                p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        with_other = PagedAdamW([other := Parameter(torch.ones(300, 41)), sharded[2]], lr=LR)
        other.grad, sharded[2].grad = sharded[0].grad, None
        with pytest.raises(TypeError, match="gradient of parameter 0: expected Tensor, got DTensor"):
            with_other.step()
        assert not with_other.state
        assert bits([p.to_local() for p in sharded]) == bits(plain)
        state = optimizers[1].state_dict()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert isinstance(state["state"][0][moment], DTensor)
            assert state["state"][0][moment].placements == (Shard(0),)
        theirs.load_state_dict(state)
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].redistribute(placements=[Replicate()])
        with pytest.raises(ValueError, match=r"exp_avg of parameter 0: expected placements .*Shard.*, got .*Replicate"):
            optimizers[1].load_state_dict(state)
        optimizers[1].load_state_dict(theirs.state_dict())
        optimizers[1].save_states(tmp_path / "states")
        optimizers[1].load_states(tmp_path / "states")
        expected = optimizers[0].state_dict()["state"]
        for i, entry in optimizers[1].state_dict()["state"].items():
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(entry[moment].to_local(), expected[i][moment])
            assert entry["step"] == 3
    finally:
        dist.destroy_process_group()


def test_a_gradient_is_taken_as_its_parameter_lies() -> None:
    """On one of two processes; the other needs no word of it: what it replicates is here, too."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh, values, grad = init_device_mesh("cpu", (2,)), torch.randn(5, 7).t(), torch.randn(7, 5)
        plain = Parameter(values[4:].clone())
        sharded = Parameter(DTensor.from_local(values[4:], mesh, [Shard(0)], shape=(7, 5), stride=(1, 7)))
        plain.grad, sharded.grad = grad[4:], DTensor.from_local(grad, mesh, [Replicate()])
        for p in (plain, sharded):
            optimizer = PagedAdamW([p], lr=LR)
            optimizer.step()
        assert bits([sharded.to_local()]) == bits([plain])
        state = optimizer.state_dict()["state"][0]["exp_avg"]
        assert (state.shape, state.placements, state.to_local().shape) == ((7, 5), (Shard(0),), (3, 5))
        assert state.stride() == (5, 1)  # as that of the shard, whatever the parameter's
        saved, parts = optimizer.state_dict(), DTensor.from_local(torch.ones(7, 5), mesh, [Partial()])
        saved["state"][0]["exp_avg"] = parts.redistribute(placements=[Shard(0)], async_op=True)  # still under way
        optimizer.load_state_dict(saved)
        sharded.grad = DTensor.from_local(torch.ones(2, 5), mesh, [Shard(0)], shape=(7, 5), stride=(5, 1))
        with pytest.raises(ValueError, match=r"expected a local shard of shape \[3, 5\], got \[2, 5\]"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_a_plain_gradient_of_a_dtensor_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        p = Parameter(distribute_tensor(torch.ones(8), init_device_mesh("cpu", (1,)), [Replicate()]))
        p.grad = torch.ones(8)
        optimizer = PagedAdamW([p])
        with pytest.raises(TypeError, match="gradient of parameter 0: expected DTensor, got Tensor"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


# --- on a GPU -------------------------------------------------------------------------------------------------------

CUDA_PAGINGS: dict[str, dict[str, Any]] = {
    "resident": {},
    "half": {"page_bytes": 16 * KIB, "device_budget": 200 * KIB},
    "all-on-host": {"page_bytes": 8 * KIB, "device_budget": 0},
    "host-and-file": {"page_bytes": 8 * KIB, "device_budget": 64 * KIB, "host_budget": 128 * KIB, "page_file": None},
    "all-in-file": {"page_bytes": 8 * KIB, "device_budget": 0, "host_budget": 0, "page_file": None},
}


@pytest.mark.needs_cuda
@pytest.mark.parametrize("options", [{}, {"state_bits": 8}], ids=str)
@pytest.mark.parametrize("name", CUDA_PAGINGS)
def test_cuda_gives_the_bytes_of_the_cpu(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected, on_cpu = train(partial(PagedAdamW, lr=LR, **options), 12)
    params = [Parameter(p.detach().cuda()) for p in parameters()]
    paged = options | CUDA_PAGINGS[name]
    if "page_file" in paged:
        paged["page_file"] = tmp_path / "pages"
    optimizer = PagedAdamW(params, lr=LR, **paged)
    stream = torch.cuda.Stream()
    for step in range(12):
        set_gradients(cpu := parameters(), step)
        with torch.cuda.stream(stream if step % 2 else torch.cuda.default_stream()):  # it follows the current stream
            for p, q in zip(params, cpu, strict=True):
                p.grad = q.grad.cuda()
            optimizer.step()
        torch.cuda.synchronize()
    assert bits([p.cpu() for p in params]) == bits(expected)
    assert state_bits(optimizer) == state_bits(on_cpu)
    stats = optimizer.stats()
    assert (stats["pages"]["device"] > 0) == ("all" not in name)
    assert (stats["pages"]["file"] > 0) == ("file" in name)
    again = PagedAdamW(params, lr=LR, **paging("resident", tmp_path), **options)
    again.load_state_dict(optimizer.state_dict())
    assert state_bits(again) == state_bits(on_cpu)
