"""_C.adamw_step: torch's AdamW, in fp32 or with 8-bit states."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from adamw import HYPER, SIZES, Ours, gradients, parameters
from cases import DTYPES
from torch import Tensor

from qlora_ext import _C


def as_torch_calls_it(hyper: dict[str, Any]) -> dict[str, Any]:
    kept = {name: hyper[name] for name in ("lr", "eps", "weight_decay", "maximize") if name in hyper}
    return kept | {"betas": (hyper["beta1"], hyper["beta2"])}


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
    params = parameters(sizes=(16, *SIZES[1:]))  # of one number torch's error may be small by luck
    ours, one = Ours(params), Ours([params[0][:1]])
    for step in range(1, 101):
        grads = gradients(step, params)
        ours.step(step, grads, **hyper)
        one.step(step, [grads[0][:1]], **hyper)
    assert torch.equal(one.params[0], ours.params[0][:1])  # which is what it would be among others
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
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        ours = Ours(params, is_8bit=is_8bit)
        for step in range(1, 4):
            ours.step(step, gradients(step, params), seed=1)
        results.append(ours.tensors())
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


def test_tensors_on_a_device_that_nothing_is_built_for() -> None:
    given = {
        name: [each.to("meta") for each in value] if isinstance(value, list) else value
        for name, value in arguments().items()
    }
    positional = [given.pop(key) for key in list(arguments())[:6]]
    with pytest.raises(ValueError, match=r"expected device cpu .*, got meta"):
        _C.adamw_step(*positional, **given)
