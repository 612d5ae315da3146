"""_C.adamw_step: torch's AdamW, in fp32 or with 8-bit states."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from cases import DTYPES
from reference import codebook
from torch import Tensor

from qlora_ext import _C

HYPER: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SIZES = (1, 255, 4096 + 100, 40_000)
BLOCK = 256


def as_torch_calls_it(hyper: dict[str, Any]) -> dict[str, Any]:
    kept = {name: hyper[name] for name in ("lr", "eps", "weight_decay", "maximize") if name in hyper}
    return kept | {"betas": (hyper["beta1"], hyper["beta2"])}


def parameters(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [torch.randn(n).to(dtype) for n in sizes]


def gradients(step: int, params: list[Tensor]) -> list[Tensor]:
    """Of different sizes, some of them 0, the same in every call."""
    generator = torch.Generator().manual_seed(step)
    sizes = [10.0 ** (-i) for i in range(len(params))]
    grads = [torch.randn(p.numel(), generator=generator) * size for p, size in zip(params, sizes, strict=True)]
    return [grad * (torch.rand(grad.numel(), generator=generator) > 0.1) for grad in grads]


class Ours:
    """Parameters with their states."""

    def __init__(self, params: list[Tensor], *, is_8bit: bool = False) -> None:
        self.params = [p.clone() for p in params]
        blocks = [-(-p.numel() // BLOCK) for p in params]
        self.absmax = [[torch.zeros(n) for n in blocks] if is_8bit else [] for _ in range(2)]
        if is_8bit:
            self.exp_avg = [torch.full((p.numel(),), 127, dtype=torch.uint8) for p in params]
            self.exp_avg_sq = [torch.zeros(p.numel(), dtype=torch.uint8) for p in params]
        else:
            self.exp_avg, self.exp_avg_sq = ([torch.zeros(p.numel()) for p in params] for _ in range(2))

    def step(self, step: int, grads: list[Tensor], **options: Any) -> None:
        _C.adamw_step(self.params, grads, self.exp_avg, self.exp_avg_sq, *self.absmax, step=step, **HYPER | options)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.exp_avg, *self.exp_avg_sq, *self.absmax[0], *self.absmax[1]]

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Decoded."""
        if not self.absmax[0]:
            return list(zip(self.exp_avg, self.exp_avg_sq, strict=True))
        books = codebook("dynamic"), codebook("dynamic_unsigned")
        decoded = [
            [
                book[codes.int()] * scale.repeat_interleave(BLOCK)[: codes.numel()]
                for codes, scale in zip(*one, strict=True)
            ]
            for book, one in zip(
                books, [(self.exp_avg, self.absmax[0]), (self.exp_avg_sq, self.absmax[1])], strict=True
            )
        ]
        return list(zip(*decoded, strict=True))


def torch_steps(
    params: list[Tensor], steps: int, dtype: torch.dtype, hyper: dict[str, Any], **options: Any
) -> list[Tensor]:
    """The parameters after so many steps of torch.optim.AdamW in dtype."""
    leaves = [p.to(dtype, copy=True).requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(leaves, **as_torch_calls_it(hyper), **options)
    for step in range(1, steps + 1):
        for leaf, grad in zip(leaves, gradients(step, params), strict=True):
            leaf.grad = grad.to(dtype)
        optimizer.step()
    return [leaf.detach() for leaf in leaves]


@pytest.mark.parametrize(
    "hyper",
    [
        HYPER,
        HYPER | {"weight_decay": 0.0, "beta1": 0.0},
        HYPER | {"beta1": 0.4, "beta2": 0.5, "eps": 1e-3},
        HYPER | {"beta2": 0.0, "maximize": True},
    ],
    ids=["usual", "no-momentum", "short-memory", "sign"],
)
def test_hundred_steps_of_torch(hyper: dict[str, Any], cpu_path: str) -> None:
    """The norm of the difference, and elementwise: at most twice as far from fp64 as torch's fused AdamW is."""
    params = parameters()
    ours = Ours(params)
    for step in range(1, 101):
        ours.step(step, gradients(step, params), **hyper)
    fused = torch_steps(params, 100, torch.float32, hyper, fused=True)
    exact = torch_steps(params, 100, torch.float64, hyper)
    for p, q, x in zip(ours.params, fused, exact, strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()
        assert (p - x).abs().max() <= 2 * (q - x).abs().max() + torch.finfo(torch.float32).eps * x.abs().max()


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(product(DTYPES.values(), DTYPES.values())))
def test_dtypes(dtype: torch.dtype, grad_dtype: torch.dtype, cpu_path: str) -> None:
    """The update of the fp32 twin, rounded once."""
    params = parameters(dtype)
    grads = [grad.to(grad_dtype) for grad in gradients(1, params)]
    ours, twin = Ours(params), Ours([p.float() for p in params])
    ours.step(1, grads)
    twin.step(1, [grad.float() for grad in grads])
    for p, q in zip(ours.params, twin.params, strict=True):
        assert torch.equal(p, q.to(dtype))
    for a, b in zip(ours.tensors()[len(params) :], twin.tensors()[len(params) :], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bytes_do_not_depend_on_threads(is_8bit: bool, threads: int) -> None:
    params = parameters(torch.bfloat16, (200_000, 100, 70_001))
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        ours = Ours(params, is_8bit=is_8bit)
        for step in range(1, 4):
            ours.step(step, gradients(step, params), seed=1)
        results.append(ours.tensors())
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- gradients with a scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
def test_gradients_are_unscaled(is_8bit: bool, cpu_path: str) -> None:
    params = parameters()
    scaled, plain = Ours(params, is_8bit=is_8bit), Ours(params, is_8bit=is_8bit)
    for step in range(1, 4):
        grads = gradients(step, params)
        plain.step(step, grads)
        scale = torch.tensor(2.0**16)
        scaled.step(step, [grad * scale for grad in grads], grad_scale=scale, found_inf=torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(scaled.tensors(), plain.tensors(), strict=True))


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
def test_found_inf_leaves_everything(is_8bit: bool, cpu_path: str) -> None:
    params = parameters()
    ours = Ours(params, is_8bit=is_8bit)
    ours.step(1, gradients(1, params))
    before = [tensor.clone() for tensor in ours.tensors()]
    bad = [torch.full_like(p, torch.inf) for p in params]
    ours.step(2, bad, grad_scale=torch.tensor(8.0), found_inf=torch.ones(1))
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), before, strict=True))


# --- 8-bit states -----------------------------------------------------------------------------------------------------


def test_states_are_within_half_a_gap_of_the_code(cpu_path: str) -> None:
    """After each step, of what the step made of the states before it: no other code is nearer, and 0 stays 0.

    The code of 0 is no candidate for a second moment that is not.
    """
    params = parameters()
    ours = Ours(params, is_8bit=True)
    books = codebook("dynamic").double(), codebook("dynamic_unsigned").double()
    for step in range(1, 6):
        exact = Ours(ours.params)
        for i, (m, v) in enumerate(ours.states()):
            exact.exp_avg[i], exact.exp_avg_sq[i] = m, v
        grads = gradients(step, params)
        exact.step(step, grads)
        ours.step(step, grads)
        assert all(torch.equal(p, q) for p, q in zip(ours.params, exact.params, strict=True))
        for i, wanted in enumerate(exact.states()):
            for book, values, codes, absmax in zip(
                books, wanted, (ours.exp_avg[i], ours.exp_avg_sq[i]), (one[i] for one in ours.absmax), strict=True
            ):
                padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
                assert torch.equal(absmax, padded.abs().amax(1))
                x = (padded.double() / absmax.double()[:, None]).view(-1)[: len(values)].nan_to_num(0.0)
                decoded = book[codes.int()]
                nearest = (
                    (x[:, None] - book[book != 0]).abs().amin(1) if book[0] == 0 else (x[:, None] - book).abs().amin(1)
                )
                off = (x - decoded).abs()
                assert (off <= nearest + 2.0**-23 * x.abs())[values != 0].all()  # x is rounded twice
                assert (decoded[values == 0] == 0).all()


def test_8bit_is_near_32bit(cpu_path: str) -> None:
    """Over 50 steps the parameters part by less than a tenth of the way that they went."""
    params = parameters(sizes=(40_000,))
    ours, exact = Ours(params, is_8bit=True), Ours(params)
    for step in range(1, 51):
        grads = gradients(step, params)
        ours.step(step, grads)
        exact.step(step, grads)
    assert (ours.params[0] - exact.params[0]).norm() < 0.1 * (exact.params[0] - params[0]).norm()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_bad_gradients_spoil_no_more_than_their_block(bad: float, cpu_path: str) -> None:
    """They are kept out by found_inf; this is what happens without."""
    params = parameters(sizes=(1024,))
    grads = gradients(1, params)
    grads[0][300] = bad
    ours, clean = Ours(params, is_8bit=True), Ours(params, is_8bit=True)
    ours.step(1, grads)
    clean.step(1, gradients(1, params))
    others = torch.arange(1024) // BLOCK != 1
    assert ours.params[0][300].isnan()
    assert ours.params[0].isnan().sum() == 1
    for a, b in zip(ours.states()[0], clean.states()[0], strict=True):
        assert torch.equal(a[others], b[others])
    assert not ours.absmax[0][0][1].isfinite()


# --- stochastic rounding ----------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_fair(cpu_path: str) -> None:
    """Updates far below a unit in the last place of bf16 are lost to nearest, and on average not lost at all."""
    n, steps = 100_000, 20
    params, grads = [torch.ones(n, dtype=torch.bfloat16)], [torch.ones(n)]
    options = {"lr": 1e-4, "weight_decay": 0.0}
    nearest, stochastic = Ours(params), Ours(params)
    for step in range(1, steps + 1):
        nearest.step(step, grads, **options)
        stochastic.step(step, grads, seed=0, **options)
    assert (nearest.params[0] == 1).all()
    went = 1 - stochastic.params[0].double()
    # Below 1 a unit is 2^-8: the variance of a step is at most a quarter of its square.
    assert abs(went.mean() - steps * 1e-4) < 5 * math.sqrt(steps / 4 / n) * 2.0**-8
    assert set(torch.unique(went * 256).tolist()) <= {float(i) for i in range(-2 * steps, steps + 1)}


def test_stochastic_rounding_depends_on_seed_step_and_parameter_alone() -> None:
    params = parameters(torch.bfloat16, (1000,)) * 2
    grads = gradients(1, params)
    grads[1] = grads[0]

    def rounded(seed: int | None, step: int) -> list[Tensor]:
        ours = Ours(params)
        ours.step(step, grads, seed=seed)
        return ours.params

    first = rounded(7, 1)
    assert torch.equal(first[0], rounded(7, 1)[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], rounded(8, 1)[0])
    assert not torch.equal(first[0], rounded(None, 1)[0])
    up = [(a != b).double().mean() for a, b in zip(first, rounded(7, 2), strict=True)]
    assert min(up) > 0.1  # another step, other bits


def test_seed_changes_nothing_but_bf16() -> None:
    for dtype in (torch.float32, torch.float16):
        params = parameters(dtype)
        ours, other = Ours(params), Ours(params)
        ours.step(1, gradients(1, params), seed=1)
        other.step(1, gradients(1, params))
        assert all(torch.equal(a, b) for a, b in zip(ours.params, other.params, strict=True))


# --- arguments --------------------------------------------------------------------------------------------------------


def test_nothing_to_do() -> None:
    Ours([]).step(1, [])
    Ours([torch.zeros(0)]).step(1, [torch.zeros(0)])


def arguments(is_8bit: bool = False) -> dict[str, Any]:
    ours = Ours([torch.ones(300)], is_8bit=is_8bit)
    return {
        "params": ours.params,
        "grads": [torch.ones(300)],
        "exp_avg": ours.exp_avg,
        "exp_avg_sq": ours.exp_avg_sq,
        "exp_avg_absmax": ours.absmax[0],
        "exp_avg_sq_absmax": ours.absmax[1],
        "step": 1,
    } | HYPER


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("grads", [], ValueError, "grads: expected 1 tensors, as in params, got 0"),
    ("exp_avg", [], ValueError, "exp_avg: expected 1 tensors"),
    ("exp_avg_sq", [], ValueError, "exp_avg_sq: expected 1 tensors"),
    ("exp_avg_absmax", [torch.zeros(2)] * 2, ValueError, "exp_avg_absmax: expected 1 tensors"),
    ("exp_avg_sq_absmax", [torch.zeros(2)], ValueError, "exp_avg_sq_absmax: expected 0 tensors"),
    ("step", 0, ValueError, "step: expected at least 1, got 0"),
    (
        "params",
        [torch.ones(300, dtype=torch.float64)],
        TypeError,
        "params: expected dtype float32, float16 or bfloat16",
    ),
    ("params", [torch.ones(600)[::2]], ValueError, "params: expected a contiguous tensor, got strides"),
    ("grads", [torch.ones(299)], ValueError, "grads: expected 300 elements, got 299"),
    ("grads", [torch.ones(300, dtype=torch.int32)], TypeError, "grads: expected dtype float32, float16 or bfloat16"),
    ("grads", [torch.ones(300, device="meta")], ValueError, "grads: expected device cpu, got meta"),
    ("exp_avg", [torch.ones(300, dtype=torch.uint8)], TypeError, "exp_avg: expected dtype Float, got Byte"),
    ("exp_avg_sq", [torch.ones(301)], ValueError, "exp_avg_sq: expected 300 elements, got 301"),
    ("grad_scale", torch.ones(2), ValueError, "grad_scale: expected 1 elements, got 2"),
    ("found_inf", torch.ones(1, dtype=torch.bool), TypeError, "found_inf: expected dtype Float, got Bool"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=[f"{row[0]}-{i}" for i, row in enumerate(BAD)])
def test_bad_arguments(name: str, value: Any, error: type[Exception], message: str) -> None:
    given = arguments() | {name: value}
    positional = [given.pop(key) for key in list(arguments())[:6]]
    with pytest.raises(error, match=f"adamw_step: {message}"):
        _C.adamw_step(*positional, **given)


@pytest.mark.parametrize("name", ["exp_avg_absmax", "exp_avg_sq_absmax"])
def test_bad_absmax(name: str) -> None:
    given = arguments(is_8bit=True) | {name: [torch.zeros(3)]}
    positional = [given.pop(key) for key in list(arguments())[:6]]
    with pytest.raises(ValueError, match=f"adamw_step: {name}: expected 2 elements, got 3"):
        _C.adamw_step(*positional, **given)
