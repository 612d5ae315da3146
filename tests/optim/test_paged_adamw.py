"""PagedAdamW updates as torch.optim.AdamW does, the same bytes however its states are paged."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import PAGINGS, bits, paging, parameters, set_gradients, state_bits, take_steps, train
from torch import Tensor
from torch.nn import Parameter

from qlora_ext import PagedAdamW

LR = 1e-2


def flat(params: list[Parameter]) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in params])


# --- the arithmetic -------------------------------------------------------------------------------------------------


HYPERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "others": {"weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 1e-5},
    "maximize": {"maximize": True},
}


@cache  # the same for every CPU path
def torchs_100_steps(hyper: str) -> tuple[Tensor, Tensor]:
    """What torch's AdamW makes of the parameters in fp32, and in fp64."""
    torchs, _ = train(partial(torch.optim.AdamW, lr=LR, fused=True, **HYPERS[hyper]), 100)
    exact = [Parameter(p.detach().double()) for p in parameters()]
    optimizer = torch.optim.AdamW(exact, lr=LR, **HYPERS[hyper])
    source = parameters()
    for step in range(100):
        set_gradients(source, step)
        for p, q in zip(exact, source, strict=True):
            p.grad = q.grad.double()
        optimizer.step()
    return flat(torchs), flat(exact)


@pytest.mark.parametrize("hyper", HYPERS)
def test_100_steps_are_those_of_torch(hyper: str, cpu_path: str) -> None:
    ours, _ = train(partial(PagedAdamW, lr=LR, **HYPERS[hyper]), 100)
    got, (like, true) = flat(ours), torchs_100_steps(hyper)
    assert (got - like).norm() <= 1e-6 * like.norm()
    assert (got - true).abs().max() <= 2 * (like - true).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_have_fp32_states(dtype: torch.dtype) -> None:
    """Each step is the fp32 step, rounded once."""
    params, optimizer = train(partial(PagedAdamW, lr=LR), 1, dtype)
    wide = [Parameter(p.detach().float()) for p in parameters(dtype)]
    set_gradients(narrow := parameters(dtype), 0)
    for p, q in zip(wide, narrow, strict=True):
        p.grad = q.grad.float()
    PagedAdamW(wide, lr=LR).step()
    assert bits(params) == bits([p.to(dtype) for p in wide])
    assert {v.dtype for entry in optimizer.state_dict()["state"].values() for v in entry.values()} == {torch.float32}


@pytest.mark.parametrize("name", PAGINGS)
@pytest.mark.parametrize("options", [{}, {"state_bits": 8}], ids=str)
def test_same_bytes_for_every_paging_and_thread_count(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected, resident = train(partial(PagedAdamW, lr=LR, **options), 12)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got, optimizer = train(partial(PagedAdamW, lr=LR, **options, **paging(name, tmp_path)), 12)
        assert bits(got) == bits(expected)
        assert state_bits(optimizer) == state_bits(resident)


def test_8_bit_states_follow_32_bit_ones() -> None:
    def run(state_bits: int) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        optimizer = PagedAdamW(params := parameters(), lr=LR, state_bits=state_bits)
        generator = torch.Generator().manual_seed(3)
        for _ in range(100):
            for p in params:
                p.grad = p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
            optimizer.step()
        return flat(params), optimizer.state_dict()["state"]

    (got, entry), (exact, _) = run(8), run(32)
    assert 0 < (got - exact).norm() <= 0.03 * (exact - flat(parameters())).norm()
    assert entry[0]["exp_avg"].dtype == torch.uint8  # 12,300 elements
    assert entry[0]["exp_avg_absmax"].shape == (49,)
    assert entry[3]["exp_avg"].dtype == torch.uint8  # 4,096
    assert entry[1]["exp_avg"].dtype == torch.float32  # 7


def test_stochastic_rounding_is_unbiased_and_repeats(tmp_path: Path) -> None:
    def run(seed: int, steps: int = 64, **options: Any) -> Tensor:
        p = Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = PagedAdamW([p], lr=1e-4, weight_decay=0, seed=seed, **options)
        for _ in range(steps):  # each far below half of a bfloat16's last bit at 1
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(0), torch.ones(20000, dtype=torch.bfloat16))
    rounded = run(1, stochastic_rounding=True)
    assert rounded.double().mean().item() == pytest.approx(1 - 64 * 1e-4, abs=2e-4)
    paged = run(1, stochastic_rounding=True, page_bytes=4096, host_budget=0, page_file=tmp_path / "pages")
    assert torch.equal(rounded, paged)
    assert not torch.equal(rounded, run(2, stochastic_rounding=True))


# --- what a torch optimizer does ------------------------------------------------------------------------------------


def test_groups_schedulers_closures_accumulation_and_clipping() -> None:
    """One run with all of them, like torch's."""

    def run(kind: Any) -> list[Parameter]:
        params = parameters()
        optimizer = kind([{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 3e-3}], lr=LR)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for step in range(20):
            set_gradients(params, step)
            first = [p.grad.clone() for p in params]
            set_gradients(params, step + 100)
            for p, grad in zip(params, first, strict=True):
                p.grad += grad
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            assert optimizer.step(lambda: torch.tensor(7.0)) == 7.0
            scheduler.step()
        return params

    got, expected = flat(run(PagedAdamW)), flat(run(torch.optim.AdamW))
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_parameters_without_gradient_are_left_alone() -> None:
    params = parameters()
    params[2].requires_grad_(False)
    before = bits(params)
    optimizer = PagedAdamW(params, lr=LR)
    set_gradients(params, 0)
    params[0].grad = params[2].grad = None
    optimizer.step()
    changed = [i for i, (p, q) in enumerate(zip(bits(params), before, strict=True)) if p != q]
    assert changed == [1, 3, 4, 6]
    assert sorted(optimizer.state_dict()["state"]) == [1, 3, 4, 5, 6]
    params[2].requires_grad_(True)  # unfrozen later
    set_gradients(params, 1)
    optimizer.step()
    assert bits([params[2]]) != [before[2]]


def test_add_param_group_after_steps(tmp_path: Path) -> None:
    def run(kind: Any) -> list[Parameter]:
        params = parameters()
        optimizer = kind(params[:3], lr=LR)
        take_steps(params[:3], optimizer, range(5))
        optimizer.add_param_group({"params": params[3:], "lr": 1e-3})
        take_steps(params, optimizer, range(5, 10))
        return params

    options = paging("half", tmp_path) | {"host_budget": 0}
    got, expected = flat(run(partial(PagedAdamW, **options))), flat(run(torch.optim.AdamW))
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_views_that_are_not_contiguous() -> None:
    base = torch.randn(60, 50)
    strided, plain = Parameter(base.t()), Parameter(base.t().contiguous())
    optimizers = [PagedAdamW([p], lr=LR) for p in (strided, plain)]
    for step in range(3):
        set_gradients([plain], step)
        strided.grad = torch.empty_like(strided).copy_(plain.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert bits([strided]) == bits([plain])
    assert strided.stride() == (1, 50)


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("name", ["resident", "all-in-file"])
def test_grad_scaler(finite: bool, name: str, tmp_path: Path) -> None:
    """Unscaling inside the step gives the same step; one with an Inf is left out whole."""
    params, reference = parameters(), parameters()
    optimizer = PagedAdamW(params, lr=LR, **paging(name, tmp_path))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = PagedAdamW(reference, lr=LR)
    for step in range(3):
        set_gradients(reference, step)
        set_gradients(params, step)
        for p in params:
            p.grad *= scaler.get_scale()
        if step == 1 and not finite:
            params[3].grad[17] = float("inf")
        scaler.scale(torch.tensor(1.0))
        scaled = bits([p.grad for p in params])
        scaler.step(optimizer)
        assert bits([p.grad for p in params]) == scaled  # no pass over them beside the step's own
        scaler.update()
        if step != 1 or finite:
            plain.step()
        assert bits(params) == bits(reference)
    assert state_bits(optimizer) == state_bits(plain)


@pytest.mark.parametrize("options", [{}, {"state_bits": 8}], ids=str)
def test_nan_stays_in_its_element_or_block(options: dict[str, Any]) -> None:
    p = Parameter(torch.ones(8192))
    optimizer = PagedAdamW([p], lr=LR, **options)
    p.grad = torch.ones(8192)
    p.grad[5000] = float("nan")
    optimizer.step()
    for _ in range(2):
        p.grad = torch.ones(8192)
        optimizer.step()
    lost = p.isnan().nonzero().flatten()
    block = torch.arange(5000 // 256 * 256, 5000 // 256 * 256 + 256) if options else torch.tensor([5000])
    assert set(lost.tolist()) <= set(block.tolist())
    assert 5000 in lost


# --- what is refused ------------------------------------------------------------------------------------------------


def test_bad_parameters_and_gradients_change_nothing() -> None:
    params = parameters()
    optimizer = PagedAdamW(params, lr=LR)
    take_steps(params, optimizer, range(2))
    before, states = bits(params), state_bits(optimizer)
    set_gradients(params, 2)
    params[3].grad = torch.ones(4096).to_sparse()
    with pytest.raises(ValueError, match=r"gradient of parameter 3: expected a dense tensor, got torch.sparse_coo"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"params: expected dtype float32, float16 or bfloat16, got torch.float64"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3, dtype=torch.float64))]})
    with pytest.raises(ValueError, match="params: expected each parameter once"):
        optimizer.add_param_group({"params": [twice := Parameter(torch.ones(3)), twice]})
    assert len(optimizer.param_groups) == 1
    expanded = Parameter(torch.ones(1).expand(5))
    expanded.grad, params[3].grad = torch.ones(5), torch.ones(4096)
    optimizer.add_param_group({"params": [expanded, Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)]})
    with pytest.raises(ValueError, match="parameter 7: expected elements of their own, got"):
        optimizer.step()
    optimizer.remove_param_group(1)
    assert (bits(params), state_bits(optimizer)) == (before, states)
    with pytest.raises(TypeError, match="cannot be"):
        optimizer.__getstate__()


@pytest.mark.parametrize("size", [100, 200_000])
def test_a_parameter_that_has_changed_its_size_is_refused(size: int, tmp_path: Path) -> None:
    other, p = Parameter(torch.ones(10)), Parameter(torch.ones(100_000))
    optimizer = PagedAdamW([other, p], lr=LR, page_bytes=4096)
    other.grad, p.grad = torch.ones(10), torch.ones(100_000)
    optimizer.step()
    before = bits([other])
    p.grad = None
    p.data = torch.ones(size)
    p.grad = torch.ones(size)
    for act in (optimizer.step, optimizer.state_dict, lambda: optimizer.save_states(tmp_path / "states")):
        with pytest.raises(ValueError, match=f"expected 100000 elements on cpu, as when added, got {size}"):
            act()
    assert bits([other]) == before
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_that_has_changed_its_device_is_refused() -> None:
    optimizer = PagedAdamW([p := Parameter(torch.ones(3))])
    p.grad = torch.ones(3)
    optimizer.step()
    p.grad = None
    torch.utils.swap_tensors(p, Parameter(torch.ones(3, device="meta")))
    p.grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="expected 3 elements on cpu, as when added, got 3 on meta"):
        optimizer.step()


def test_what_another_replaces_in_param_groups_is_freed() -> None:
    optimizer = PagedAdamW([Parameter(torch.ones(10))], page_bytes=4096)
    for _ in range(20):
        optimizer.add_param_group({"params": [p := Parameter(torch.ones(1000))]})
        p.grad = torch.ones(1000)
        optimizer.step()
        optimizer.param_groups.pop()
    assert sum(optimizer.stats()["pages"].values()) <= 4
    assert len(optimizer.state) <= 1
