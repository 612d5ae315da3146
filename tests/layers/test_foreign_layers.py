"""Linear layers with a mind of their own: subclasses, hooks, other weights; and models that read a layer's weight."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from random_layers import names_of, randomize_adapters
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from qlora_ext import (
    Linear4bit,
    LoraConfig,
    LoraLinear,
    add_adapter,
    merge_adapter,
    quantize_model,
    set_adapter,
    unmerge_adapter,
)

BOTH = LoraConfig(r=2, target_modules=["0", "1"])
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Router(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input).topk(2)


def model_of(kind: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(kind(64, 64), nn.Linear(64, 64))


def adapted(kind: type[nn.Linear] = nn.Linear, *, quantized: bool = False) -> nn.Sequential:
    model = model_of(kind)
    if quantized:
        quantize_model(model)
    add_adapter(model, BOTH)
    randomize_adapters(model)
    return model


def doubled(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output * 2


def refuse(*_: object) -> None:
    raise AssertionError("nothing is computed in these tests")


def replace_forward(layer: nn.Module) -> None:
    """As accelerate's hooks do."""
    layer.forward = functools.partial(type(layer).forward, layer)  # type: ignore[method-assign]


CHANGES: list[Callable[[nn.Module], object]] = [
    replace_forward,
    lambda layer: setattr(layer, "forward", types.MethodType(refuse, layer)),
    lambda layer: layer.register_forward_hook(refuse),
    lambda layer: layer.register_forward_pre_hook(refuse),
    lambda layer: layer.register_full_backward_hook(refuse),
    lambda layer: layer.register_full_backward_pre_hook(refuse),
]


def test_all_linear_leaves_subclasses_and_a_name_takes_them() -> None:
    model = model_of(Halved)
    add_adapter(model, LoraConfig(r=2))
    assert [type(layer) for layer in model] == [Halved, LoraLinear]
    add_adapter(model, BOTH, "named")
    assert [type(layer) for layer in model] == [LoraLinear, LoraLinear]


def test_falcons_linear_layer_is_one() -> None:
    quantized = adapted(FalconLinear, quantized=True)
    assert [type(layer.base_layer) for layer in quantized] == [Linear4bit, Linear4bit]
    merge_adapter(quantized, dequantize=True)
    assert [type(layer) for layer in quantized] == [nn.Linear, nn.Linear]
    dense = model_of(FalconLinear)
    add_adapter(dense, LoraConfig(r=2))
    assert [type(layer) for layer in dense] == [LoraLinear, LoraLinear], "all-linear takes it"
    randomize_adapters(dense)
    expected = dense(X)
    merge_adapter(dense, dequantize=True)
    assert [type(layer) for layer in dense] == [FalconLinear, nn.Linear]
    torch.testing.assert_close(dense(X), expected)


def test_all_linear_says_why_it_takes_none() -> None:
    with pytest.raises(ValueError, match=r"expected an nn.Linear that .* has nn.Linear's forward, or names.*: 0\)"):
        add_adapter(nn.Sequential(Halved(64, 64)), LoraConfig(r=2))


def test_a_subclass_that_returns_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="base_layer: expected a tensor from Router's forward, got topk"):
        adapted(Router)(X)


def test_quantize_model_says_that_there_are_only_subclasses() -> None:
    hint = r" \(one that computes as nn.Linear does .*: layer.__class__ = nn.Linear\)$"
    with pytest.raises(ValueError, match=r"expected an nn.Linear.*got only subclasses of it \(Halved\)" + hint):
        quantize_model(nn.Sequential(Halved(64, 64)))


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_merged_subclass_computes_in_its_own_way(dequantize: bool) -> None:
    model = adapted(Halved)
    expected = (X @ model[0].merged_weight().T + model[0].bias) / 2
    before = model(X)
    merge_adapter(model, dequantize=dequantize)
    layer = model[0] if dequantize else model[0].merged_base
    assert type(layer) is Halved
    torch.testing.assert_close(model[0](X), expected)
    if not dequantize:
        unmerge_adapter(model)
        assert torch.equal(model(X), before)


@pytest.mark.parametrize(("dequantize", "active"), [(False, True), (True, True), (True, False)])
def test_a_weight_in_another_form_is_not_merged(dequantize: bool, active: bool) -> None:
    model = adapted()
    if not active:
        set_adapter(model, None)
    model[1].base_layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    assert model[1].weight.dtype == torch.int8
    with pytest.raises(TypeError, match=r"merge_adapter: 1: .*expected a float weight \[64, 64\].*torch.int8"):
        merge_adapter(model, dequantize=dequantize)
    assert [type(layer) for layer in model] == [LoraLinear, LoraLinear]
    assert not model[0].merged


def test_a_parametrized_layer_merges_to_a_plain_one() -> None:
    model = model_of()
    nn.utils.parametrizations.weight_norm(model[0])
    add_adapter(model, LoraConfig(r=2))
    randomize_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        weight, own = model[0].merged_weight(), model[0].base_layer.weight.clone()
    assert torch.equal(weight, model[0].merged_weight())
    merge_adapter(model)
    assert type(model[0].merged_base) is nn.Linear
    assert torch.equal(model[0].merged_base.weight, weight)
    assert torch.equal(model[0].base_layer.weight, own)


def test_a_weight_that_is_no_parameter_is_not_quantized() -> None:
    model = model_of()
    model[0] = nn.utils.weight_norm(model[0])
    quantize_model(model)
    assert [type(layer) for layer in model] == [nn.Linear, Linear4bit]


def test_assigning_weight_and_bias_reaches_the_base() -> None:
    layer, weight = adapted()[0], nn.Parameter(torch.ones(64, 64))
    layer.weight = weight
    assert layer.base_layer.weight is weight
    layer.bias = None
    assert layer.base_layer.bias is None
    layer.bias = nn.Parameter(torch.ones(64))
    assert torch.equal(layer.base_layer.bias, torch.ones(64))
    assert sorted(layer.state_dict()) == ["base_layer.bias", "base_layer.weight", "lora_A.default", "lora_B.default"]
    layer.register_parameter("own", weight)
    assert layer.own is weight


def test_a_model_that_casts_to_the_dtype_of_a_4_bit_weight_is_told() -> None:
    layer = adapted(quantized=True)[0]
    expected = r"^(lora_)?linear_4bit: x: expected dtype .*got torch\.uint8.*weight\.dtype.*skip"
    for each in (layer, layer.base_layer):
        with pytest.raises(TypeError, match=expected):
            each(X.to(layer.base_layer.weight.dtype))


@pytest.mark.parametrize("quantized", [False, True])
def test_input_is_a_keyword_as_of_nn_linear(quantized: bool) -> None:
    layer = adapted(quantized=quantized)[0]
    for each in (layer, layer.base_layer):
        assert torch.equal(each(input=X), each(X))


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
@pytest.mark.parametrize("part", ["wo", "inner.wo", "wo.weight"])
def test_what_transformers_keeps_in_fp32_is_not_quantized(part: str, attribute: str) -> None:
    model = nn.ModuleDict({"inner": nn.ModuleDict({name: nn.Linear(64, 64) for name in ("wo", "two", "word")})})
    setattr(model, attribute, {part})
    quantize_model(nn.Sequential(model))
    assert names_of(model["inner"], nn.Linear) == {"wo"}


@pytest.mark.parametrize("quantized", [False, True])
def test_hooks_of_the_base_run_beside_adapters(quantized: bool) -> None:
    model = model_of()
    if quantized:
        quantize_model(model)
    model[0].register_forward_hook(doubled)
    plain = model[0](X)
    add_adapter(model, BOTH)
    assert torch.equal(model[0](X), plain)
    randomize_adapters(model)
    layer = model[0]
    low_rank = layer.scaling["default"] * (X @ layer.lora_A["default"].T) @ layer.lora_B["default"].T
    torch.testing.assert_close(layer(X), plain + low_rank)
    layer(X).sum().backward()
    assert layer.lora_A["default"].grad is not None


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_whose_hooks_would_be_lost_is_refused(change: Callable[[nn.Module], object]) -> None:
    model = model_of()
    change(model[1])
    with pytest.raises(ValueError, match="quantize_model: 1: expected no hooks"):
        quantize_model(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    with pytest.raises(ValueError, match=r"Linear4bit\.from_linear: linear: expected no hooks"):
        Linear4bit.from_linear(model[1])
    for hooked in ("layer", "base", "without adapter"):
        model = adapted(quantized=True)
        if hooked == "without adapter":
            model[1] = model[1].base_layer
        change(model[1].base_layer if hooked == "base" else model[1])
        before = [type(layer) for layer in model]
        with pytest.raises(ValueError, match="merge_adapter: 1: expected no hooks"):
            merge_adapter(model, dequantize=True)
        assert [type(layer) for layer in model] == before


def test_a_dense_base_keeps_its_hooks_when_it_is_merged() -> None:
    model = adapted()
    model[1].base_layer.register_forward_hook(doubled)
    merge_adapter(model, dequantize=True)
    assert torch.equal(model[1](X), 2 * nn.functional.linear(X, model[1].weight, model[1].bias))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_forward_that_would_go_on_with_the_base_is_not_merged(quantized: bool) -> None:
    model = adapted(quantized=quantized)
    replace_forward(model[1].base_layer)
    with pytest.raises(TypeError, match=r"merge_adapter: 1: .*expected the forward of its class"):
        merge_adapter(model)
    assert not model[0].merged


def test_set_adapter_leaves_alone_what_else_trains() -> None:
    model = nn.ModuleDict({"body": model_of(), "head": nn.Linear(64, 3)})
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "first")
    add_adapter(model, LoraConfig(r=2, target_modules=["1"]), "second")
    assert not model["head"].weight.requires_grad
    model["head"].requires_grad_(True)
    for active in (None, "first", ["first", "second"]):
        set_adapter(model, active)
        assert model["head"].weight.requires_grad
        training = {
            name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad and "lora" in name
        }
        assert training == set([] if active is None else [active] if isinstance(active, str) else active)
    with pytest.raises(TypeError, match="set_adapter: name: expected a str, a list of them or None, got 5"):
        set_adapter(model, 5)  # type: ignore[arg-type]


def test_layers_are_freed_one_by_one() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    dense = [weakref.ref(layer) for layer in model]
    alive: list[int] = []
    from_linear = Linear4bit.from_linear

    def counted(layer: nn.Linear, **options: object) -> Linear4bit:
        alive.append(sum(ref() is not None for ref in dense))
        return from_linear(layer, **options)  # type: ignore[arg-type]

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Linear4bit, "from_linear", counted)
            quantize_model(model)
        assert alive == [5, 4, 3, 2, 1]
        quantized = [weakref.ref(layer) for layer in model]
        del model
        assert [ref() for ref in [*dense, *quantized]] == [None] * 10
    finally:
        gc.enable()


def test_a_4_bit_head_with_an_adapter_is_still_a_head() -> None:
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 64)})
    add_adapter(quantize_model(model, skip=()), LoraConfig(target_modules=["lm_head"]), "first")
    add_adapter(model, LoraConfig(), "second")
    assert model["lm_head"].configs.keys() == {"first"}
