"""_C.adamw_step: its 8-bit states, and bf16 parameters that are rounded stochastically."""

from __future__ import annotations

import math

import pytest
import torch
from adamw import BLOCK, Ours, gradients, parameters
from reference import codebook
from torch import Tensor

from qlora_ext import _C

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
        ours.step(step, grads, seed=seed, beta1=0.0, beta2=0.0)  # the same update at each step
        return ours.params

    first = rounded(7, 1)
    assert torch.equal(first[0], rounded(7, 1)[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], rounded(8, 1)[0])
    assert not torch.equal(first[0], rounded(None, 1)[0])
    assert torch.equal(rounded(None, 1)[0], rounded(None, 2)[0])
    differ = [(a != b).double().mean() for a, b in zip(first, rounded(7, 2), strict=True)]
    assert min(differ) > 0.1  # another step, other bits


def test_seed_changes_nothing_but_bf16() -> None:
    for dtype in (torch.float32, torch.float16):
        params = parameters(dtype)
        ours, other = Ours(params), Ours(params)
        ours.step(1, gradients(1, params), seed=1)
        other.step(1, gradients(1, params))
        assert all(torch.equal(a, b) for a, b in zip(ours.params, other.params, strict=True))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=hex)
def test_rounding_by_chance_leaves_nan_what_it_is_whatever_its_bits(bits: int, cpu_path: str) -> None:
    p, grad = torch.ones(512).bfloat16(), torch.full((512,), bits, dtype=torch.int32).view(torch.float32)
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
    _C.adamw_step([p], [grad], [torch.zeros(512)], [torch.zeros(512)], [], [], **options, step=1, seed=3)
    assert p.isnan().all()
