"""Experts4bit by itself: products with one matrix of a weight of three dimensions in 4 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_as_exact_as_torch, assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_ext import LoraConfig, add_adapter, merge_adapter, quantize_4bit
from qlora_ext.experts import Experts4bit, Matrix4bit

Product = Callable[[Tensor, Any], Tensor]


def with_grad(product: Product, x: Tensor, weight: object, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = product(x, weight)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"quant_type": "fp4", "blocksize": 128}], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (64, 64), (128, 96)], ids=["groups", "blocks", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_with_each_matrix(dtype: torch.dtype, rows: int, columns: int, options: dict[str, Any]) -> None:
    weight = torch.randn(3, rows, columns).to(dtype)
    experts = Experts4bit(weight, **options)
    whole_groups = rows * columns % (256 * options.get("blocksize", 64)) == 0
    assert experts.stack.double_quant == (whole_groups and options.get("double_quant", True))
    decoded = experts.dequantize()
    assert (decoded.shape, decoded.dtype) == (weight.shape, dtype)
    packed, state = quantize_4bit(weight.flatten(0, 1), **{**options, "double_quant": experts.stack.double_quant})
    assert_same(experts.stack.weight, packed)
    assert_same(experts.stack.absmax, state.absmax)
    bias = torch.randn(rows).to(dtype)
    products: list[tuple[int, Product]] = [
        (columns, lambda x, w: F.linear(x, w)),
        (columns, lambda x, w: F.linear(x, w, bias.to(x.dtype))),
        (rows, lambda x, w: x @ w),
        (rows, torch.matmul),
    ]
    for i, (size, product) in itertools.product((0, torch.tensor(1), 2, -1), products):
        x = torch.randn(5, size).to(dtype)
        grad = torch.randn(5, rows + columns - size).to(dtype)
        exact = with_grad(product, x.double(), decoded[i].double(), grad.double())
        of_torch = with_grad(product, x, decoded[i], grad)
        for results in zip(with_grad(product, x, experts[i], grad), of_torch, exact, strict=True):
            assert_as_exact_as_torch(*results)


def test_only_products_take_a_matrix() -> None:
    experts = Experts4bit(torch.randn(2, 64, 64))
    for use in (lambda w: w + 1, lambda w: torch.relu(w), lambda w: F.linear(w, torch.randn(64, 64))):
        with pytest.raises(TypeError):
            use(experts[0])
    assert isinstance(experts[0].float(), Matrix4bit)  # as openai_privacy_filter has it
    for wrong in (lambda x: F.linear(x, experts[0]), lambda x: x @ experts[0]):
        with pytest.raises(ValueError, match=r"Experts4bit: x: expected \[\.\.\., 64\], got \[5, 63\]"):
            wrong(torch.randn(5, 63))
    with pytest.raises(ValueError, match=r"x: expected dtype float32, float16 or bfloat16, got torch\.float64"):
        torch.randn(5, 64, dtype=torch.float64) @ experts[0]
    with pytest.raises(IndexError):
        experts[2]


def test_autocast_casts_x_as_for_a_float_weight() -> None:
    experts = Experts4bit(torch.randn(2, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(2, 64), experts[0]).dtype == torch.bfloat16
        assert (torch.randn(2, 64) @ experts[0]).dtype == torch.bfloat16


def test_bad_weights_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"Experts4bit: weight: expected \[experts, rows, columns\], got \[4, 4\]"):
        Experts4bit(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"matrices of whole blocks of 64 elements, got 10 x 10"):
        Experts4bit(torch.randn(2, 10, 10))
    for wrong, error in (
        ({"blocksize": 0}, ValueError),
        ({"blocksize": "64"}, TypeError),
        ({"quant_type": 4}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(wrong))):
            Experts4bit(torch.randn(2, 64, 64), **wrong)
    experts = Experts4bit(torch.randn(2, 64, 64))
    with pytest.raises(ValueError, match=r"Experts4bit: weight: expected shape \[2, 64, 64\], got \[3, 64, 64\]"):
        experts.quantize_(torch.randn(3, 64, 64))


def test_experts_of_ones_own_carry_none() -> None:
    model = nn.Module()
    model.own = Experts4bit(torch.randn(2, 64, 64))
    model.layer = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"target_parameters: .*by their last parts: none\), got 'own'"):
        add_adapter(model, LoraConfig(target_parameters=["own"]))
    merge_adapter(model, dequantize=True)
    assert isinstance(model.own, Experts4bit)
