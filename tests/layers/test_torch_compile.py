"""torch.compile(fullgraph=True) of the layers, forward and backward: no graph break, and the results of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES
from random_layers import BASES, make_base, make_linear, make_lora, randomize_adapters
from reference import assert_same
from tiny_model import tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora_ext import LoraConfig, add_adapter, dequantize_4bit, quantize_4bit, quantize_model

# Traces forward and backward as the default does, without the seconds for compiling C++.
TRACED = {"backend": "aot_eager", "fullgraph": True}
by_base = pytest.mark.parametrize("base", BASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """[y, gradient of x, gradients of the parameters that train]."""
    torch.manual_seed(0)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_compiles_as_eager(
    model: nn.Module,
    x: Tensor,
    mode: dict[str, Any] = TRACED,
    forward: Callable[[Tensor], Tensor] | None = None,
    tolerance: Callable[[Tensor], dict[str, float]] = lambda _: {},
) -> None:
    forward = forward or model
    expected = gradients(model, forward, x)
    assert len(expected) == 2 + sum(p.requires_grad for p in model.parameters())
    results = gradients(model, torch.compile(forward, **mode), x)
    for got, same in zip(results, expected, strict=True):
        torch.testing.assert_close(got, same, **tolerance(same))


@by_dtype
@pytest.mark.parametrize("in_features", [256, 100], ids=["rows", "flat"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_linear(double_quant: bool, in_features: int, dtype: torch.dtype) -> None:
    layer = make_linear(in_features, dtype=dtype, double_quant=double_quant)
    assert_compiles_as_eager(layer, torch.randn(2, 5, in_features).to(dtype))


@by_base
@by_dtype
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
def test_lora(dropout: float, adapters: int, dtype: torch.dtype, base: str) -> None:
    configs = [LoraConfig(r=4 + i, lora_dropout=dropout) for i in range(adapters)]
    layer = make_lora(make_base(base, dtype=dtype), *configs)
    layer.base_layer.requires_grad_(False)
    layer.base_layer.bias.requires_grad_()
    assert_compiles_as_eager(layer, torch.randn(2, 5, 256).to(dtype))


@by_dtype
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_quantize(double_quant: bool, dtype: torch.dtype) -> None:
    def round_trip(weight: Tensor) -> tuple[Tensor, ...]:
        packed, state = quantize_4bit(weight, double_quant=double_quant)
        return packed, state.absmax, dequantize_4bit(packed, state)

    weight = torch.randn(48, 256).to(dtype)
    for got, same in zip(torch.compile(round_trip, **TRACED)(weight), round_trip(weight), strict=True):
        assert_same(got, same)


def test_a_step_with_inductor() -> None:
    """What training runs: two layers with adapters and dropout, and an activation between them, as native code."""
    config = LoraConfig(r=4, lora_dropout=0.5)
    first, second = make_linear(), make_linear(48)
    model = nn.Sequential(make_lora(first, config, LoraConfig(r=3)), nn.SiLU(), make_lora(second, config))
    # The random numbers of eager mode, for the same masks.
    mode = {"backend": "inductor", "fullgraph": True, "options": {"fallback_random": True}}

    # It has an exp of its own, of whose rounding each sum shows two units in the last place of its largest value.
    def tolerance(same: Tensor) -> dict[str, float]:
        return {"rtol": 1.3e-6, "atol": max(1e-5, 2 * torch.finfo(same.dtype).eps * same.abs().max().item())}

    assert_compiles_as_eager(model, torch.randn(5, 256), mode, tolerance=tolerance)


@by_base
def test_under_autocast(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig())
    layer.base_layer.requires_grad_(False)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        return y

    assert_compiles_as_eager(layer, torch.randn(5, 256), forward=forward)


@by_base
def test_eval_has_no_dropout(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(lora_dropout=0.5))
    compiled = torch.compile(layer, **TRACED)
    x = torch.randn(5, 256)
    assert (compiled(x) != compiled(x)).any()
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


def test_switched_and_merged_adapters_are_seen() -> None:
    layer = make_lora(make_base("Linear4bit"), LoraConfig(), LoraConfig(r=3))
    compiled = torch.compile(layer, **TRACED)
    x = torch.randn(5, 256)
    for layer.active_adapters in (["a0", "a1"], ["a1"], []):
        assert_same(compiled(x), layer(x))
    layer.active_adapters = ["a0"]
    layer.merge()
    assert_same(compiled(x), layer(x))
    layer.unmerge()
    assert_same(compiled(x), layer(x))


def test_one_graph_takes_any_number_of_rows() -> None:
    layer = make_lora(make_base("Linear4bit"), LoraConfig())
    compiled = torch.compile(layer, dynamic=True, **TRACED)
    compiled(torch.randn(2, 256))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (3, 40):
            x = torch.randn(rows, 256)
            torch.testing.assert_close(compiled(x), layer(x))


def test_a_whole_model() -> None:
    model = quantize_model(LlamaForCausalLM(tiny_config(num_hidden_layers=1)))
    add_adapter(model, LoraConfig(r=4))
    randomize_adapters(model)

    def forward(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits

    assert_compiles_as_eager(model, torch.randn(2, 6, 64), forward=forward)
