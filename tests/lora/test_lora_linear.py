"""LoraLinear over nn.Linear and over Linear4bit, beside PEFT's."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, normal, pairwise
from random_layers import BASES, make_base, make_linear, make_lora, state_bytes, with_gradients
from reference import assert_as_exact_as_torch, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_ext import Linear4bit, LoraConfig, LoraLinear

by_base = pytest.mark.parametrize("base", BASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def adapter_weights(layer: LoraLinear) -> list[Tensor]:
    """[A of each active adapter ..., B of each ...]."""
    return [table[name].detach() for table in (layer.lora_A, layer.lora_B) for name in layer.active_adapters]


def formula(
    layer: LoraLinear, weight: Tensor, masks: list[Tensor] | None = None, keep: float = 1.0
) -> Callable[..., Tensor]:
    """f(x, A ..., B ...) = x W^T + bias + sum_i scaling_i / keep ((x * mask_i) A_i^T) B_i^T, all in the dtype of x."""
    bias = layer.base_layer.bias

    def forward(x: Tensor, *ab: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.detach().to(x.dtype))
        pairs = zip(ab[: len(ab) // 2], ab[len(ab) // 2 :], strict=True)
        for i, (name, (a, b)) in enumerate(zip(layer.active_adapters, pairs, strict=True)):
            low_rank = F.linear(x * masks[i] if masks else x, a.to(x.dtype))
            y = y + layer.scaling[name] / keep * F.linear(low_rank, b.to(x.dtype))
        return y

    return forward


def by_layer(layer: LoraLinear) -> Callable[..., Tensor]:
    """f(x, A ..., B ...) through the layer's own forward."""
    names = [f"{part}.{name}" for part in ("lora_A", "lora_B") for name in layer.active_adapters]
    return lambda x, *ab: torch.func.functional_call(layer, dict(zip(names, ab, strict=True)), (x,))


def base_weight(layer: LoraLinear, dtype: torch.dtype) -> Tensor:
    base = layer.base_layer
    return base.dequantize(dtype) if isinstance(base, Linear4bit) else base.weight.detach().to(dtype)


def assert_as_exact_as(
    plain: Callable[..., Tensor], layer: LoraLinear, x: Tensor, masks: list[Tensor] | None = None, keep: float = 1.0
) -> None:
    """Values and gradients of x, A and B by the 2x rule; fp64 takes the weight as decoded to fp32."""
    # Gradients differ from row to row: else the errors of all elements of dB are one.
    grad = torch.randn(*x.shape[:-1], 48, generator=torch.Generator()).to(x.dtype)  # not the one of layers with dropout
    leaves = [x, *adapter_weights(layer)]
    results = with_gradients(by_layer(layer), leaves, grad)
    torch_results = with_gradients(plain, leaves, grad)
    exact = formula(layer, base_weight(layer, torch.float32), masks, keep)
    exact_results = with_gradients(exact, [leaf.double() for leaf in leaves], grad)
    for got, torch_result, exact_result in zip(results, torch_results, exact_results, strict=True):
        assert_as_exact_as_torch(got, torch_result, exact_result)


@by_base
@by_dtype
@pytest.mark.parametrize("rows", [1, 70])
def test_a_fresh_adapter_changes_no_bit(rows: int, dtype: torch.dtype, base: str) -> None:
    layer = LoraLinear(make_base(base, dtype=dtype))
    for name in ("a", "b"):
        layer.add_adapter(name, LoraConfig(r=4))
    x = torch.randn(rows, 256).to(dtype)
    expected = layer.base_layer(x)
    for layer.active_adapters in ([], ["a"], ["a", "b"]):
        assert_same(layer(x), expected)


@pytest.mark.parametrize(
    ("base", "dtype_name", "in_features", "bias", "ranks"),
    pairwise(BASES, DTYPES, (256, 100), (False, True), ((1,), (8,), (5, 16))),
)
def test_values_and_gradients_as_exact_as_torch(
    base: str, dtype_name: str, in_features: int, bias: bool, ranks: tuple[int, ...]
) -> None:
    """Several active adapters add up: that is the sum in the formula."""
    dtype = DTYPES[dtype_name]
    layer = make_lora(make_base(base, in_features, bias, dtype), *(LoraConfig(r=r, lora_alpha=3 * r) for r in ranks))
    x = torch.randn(4, 16, in_features).to(dtype)
    assert_as_exact_as(formula(layer, base_weight(layer, dtype)), layer, x)


@by_base
@by_dtype
def test_values_and_gradients_as_exact_as_pefts(dtype: torch.dtype, base: str) -> None:
    """PEFT over the decoded weight, its adapters in the dtype of x, as ours are inside the multiply."""
    layer = make_lora(make_base(base, dtype=dtype), LoraConfig(r=8, lora_alpha=4))
    linear = nn.Linear(256, 48, dtype=dtype)
    linear.load_state_dict({"weight": base_weight(layer, dtype), "bias": layer.base_layer.bias})
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["0"])
    pefts = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False).base_model.model[0]

    def by_peft(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weights = {"lora_A.default.weight": a.to(dtype), "lora_B.default.weight": b.to(dtype)}
        return torch.func.functional_call(pefts, weights, (x,))

    assert_as_exact_as(by_peft, layer, torch.randn(70, 256).to(dtype))


@by_base
def test_an_inactive_adapter_does_not_count(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(), LoraConfig(r=3))
    alone = make_lora(layer.base_layer, LoraConfig())
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if "a1" not in k})
    layer.active_adapters = ["a0"]
    x = torch.randn(3, 256)
    y, grad_x = with_gradients(layer, [x])
    expected, expected_grad_x = with_gradients(alone, [x])
    assert_same(y, expected)
    assert_same(grad_x, expected_grad_x)
    layer(x).sum().backward()
    assert layer.lora_B["a0"].grad is not None
    assert layer.lora_B["a1"].grad is None


def test_a_starts_as_nn_linear_does() -> None:
    a = make_lora(make_base("nn.Linear"), LoraConfig()).lora_A["a0"]
    assert 0.99 / 16 < a.abs().max() <= 1 / 16  # 1 / sqrt(in)


@by_base
def test_bias_of_the_base_gets_its_gradient(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig())
    layer(torch.randn(3, 256)).sum().backward()
    assert_same(layer.base_layer.bias.grad, torch.full((48,), 3.0))


@by_base
@by_dtype
def test_dropout_has_the_gradients_of_the_formula_with_the_same_masks(dtype: torch.dtype, base: str) -> None:
    keep = 0.75
    config = LoraConfig(r=4, lora_dropout=1 - keep)
    layer = make_lora(make_base(base, dtype=dtype), config, config)
    x = torch.randn(4, 16, 256).to(dtype)
    torch.manual_seed(7)
    masks = [torch.ops.qlora_ext.dropout_mask(x, keep, seed) for seed in torch.randint(2**63 - 1, (2,))]
    assert (masks[0] != masks[1]).any()
    torch.manual_seed(7)
    assert_as_exact_as(formula(layer, base_weight(layer, dtype), masks, keep), layer, x, masks, keep)


@pytest.mark.parametrize("use_reentrant", [False, True])
@by_base
def test_gradient_checkpointing_draws_the_same_masks_again(base: str, use_reentrant: bool) -> None:
    layer = make_lora(make_base(base), LoraConfig(lora_dropout=0.5))

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        layer.zero_grad()
        torch.manual_seed(0)
        x = normal(3, 256).requires_grad_()
        run(x).square().sum().backward()
        return [x.grad, *(p.grad for p in (layer.lora_A["a0"], layer.lora_B["a0"]))]

    results = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    for got, same in zip(results, gradients(layer), strict=True):
        assert_same(got, same)


@by_base
def test_a_cast_leaves_adapters_and_their_gradients_in_float32(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig())
    layer(torch.randn(3, 256)).sum().backward()
    parameters = [layer.lora_A["a0"], layer.lora_B["a0"]]
    before = state_bytes(layer)
    gradients = [p.grad.clone() for p in parameters]
    assert layer.half() is layer
    assert layer.base_layer.bias.dtype == torch.float16
    after = state_bytes(layer)
    assert {name: after[name] for name in after if "lora" in name} == {
        name: before[name] for name in before if "lora" in name
    }
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert_same(parameter.grad, gradient)
    x = torch.randn(3, 256, dtype=torch.float16)
    assert layer(x).dtype == torch.float16


@by_base
def test_adapters_move_to_another_device_with_a_cast(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig()).to("meta", torch.bfloat16)
    adapter = {name: (t.device.type, t.dtype) for name, t in layer.state_dict().items() if "lora" in name}
    assert adapter == dict.fromkeys(("lora_A.a0", "lora_B.a0"), ("meta", torch.float32))


@by_base
def test_autocast_casts_x_and_keeps_gradients_in_float32(base: str) -> None:
    layer, x = make_lora(make_base(base), LoraConfig(), LoraConfig(r=3)), torch.randn(3, 256)
    leaves = [x, *adapter_weights(layer)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *gradients = with_gradients(by_layer(layer), leaves)
    if base == "nn.Linear":
        layer.bfloat16()
    expected, *expected_gradients = with_gradients(by_layer(layer), [x.bfloat16(), *leaves[1:]])
    assert_same(y, expected)
    for got, same in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == torch.float32
        assert_same(got, same.float())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # as nn.Linear's own start gives
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(0, 64, 8), (3, 0, 8), (3, 64, 0)])
def test_zero_elements(rows: int, in_features: int, out_features: int) -> None:
    layer = LoraLinear(Linear4bit(in_features, out_features))
    layer.add_adapter("a", LoraConfig(r=2))
    layer.active_adapters = ["a"]
    y, grad_x, grad_a, grad_b = with_gradients(
        by_layer(layer), [torch.randn(rows, in_features), *adapter_weights(layer)]
    )
    assert (y.shape, grad_x.shape) == ((rows, out_features), (rows, in_features))
    assert not grad_a.any()
    assert not grad_b.any()


@by_base
@by_dtype
@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (2, 0, 256)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype, base: str) -> None:
    layer = make_lora(make_base(base, dtype=dtype), LoraConfig())
    leaves = [torch.randn(shape).to(dtype), *adapter_weights(layer)]
    results = with_gradients(by_layer(layer), leaves)
    flat = with_gradients(by_layer(layer), [leaves[0].view(-1, 256), *leaves[1:]])
    for got, same in zip(results, flat, strict=True):
        assert_same(got, same.view(got.shape))
    layer(leaves[0]).sum().backward()
    assert layer.base_layer.bias.grad is not None


@by_base
@by_dtype
def test_an_in_place_operation_may_follow(dtype: torch.dtype, base: str) -> None:
    layer, x = make_lora(make_base(base, dtype=dtype), LoraConfig()), torch.randn(3, 256).to(dtype)
    assert_same(layer(x).relu_(), layer(x).relu())


@pytest.mark.parametrize("other", [nn.Conv1d(4, 4, 1), None], ids=["conv", "none"])
def test_base_must_be_linear(other: object) -> None:
    with pytest.raises(TypeError, match=rf"LoraLinear.*base_layer.*{type(other).__name__}"):
        LoraLinear(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a0", "", "a.b"])
def test_adapter_name_must_be_new_and_without_dots(name: str) -> None:
    layer = make_lora(make_linear(), LoraConfig())
    with pytest.raises(ValueError, match=f"name.*'{name}'"):
        layer.add_adapter(name, LoraConfig())
    assert list(layer.configs) == ["a0"]


def test_a_bias_may_be_taken_out_after_a_merge() -> None:
    layer = make_lora(nn.Linear(64, 48), LoraConfig(r=2))
    layer.merge()
    layer.bias = None
    x = torch.randn(3, 64)
    assert_same(layer(x), F.linear(x, layer.merged_base.weight))
