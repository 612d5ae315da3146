"""Linear4bit: what it computes and how it takes part in training. Its tensors on the move: test_linear_state.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import DTYPES, normal, pairwise
from random_layers import make_linear, state_bytes, with_gradients
from reference import assert_as_exact_as_torch, assert_same
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from qlora_ext import Linear4bit, LoraConfig, add_adapter, quantize_model

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.mark.parametrize(
    ("dtype_name", "in_features", "double_quant", "bias"),
    pairwise(DTYPES, (256, 100), (False, True), (False, True)),
)
def test_values_and_gradients_as_exact_as_torch(
    dtype_name: str, in_features: int, double_quant: bool, bias: bool
) -> None:
    dtype = DTYPES[dtype_name]
    linear = nn.Linear(in_features, 48, bias=bias, dtype=dtype)
    layer = Linear4bit.from_linear(linear, double_quant=double_quant)
    q = reference.quantize(linear.weight.detach(), double_quant=double_quant)
    leaves = [torch.randn(2, 5, in_features).to(dtype)] + ([linear.bias] if bias else [])
    grad = torch.randn(2, 5, 48).to(dtype)

    def plain(weight_dtype: torch.dtype, dtype: torch.dtype) -> list[torch.Tensor]:
        weight = reference.dequantize_4bit(q, (48, in_features), weight_dtype).to(dtype)
        return with_gradients(lambda x, b=None: F.linear(x, weight, b), [leaf.to(dtype) for leaf in leaves], grad)

    def by_layer(x: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return torch.func.functional_call(layer, {} if b is None else {"bias": b}, (x,))

    results = zip(
        with_gradients(by_layer, leaves, grad), plain(dtype, dtype), plain(torch.float32, torch.float64), strict=True
    )
    for got, torch_result, exact in results:
        assert_as_exact_as_torch(got, torch_result, exact)


@by_dtype
@pytest.mark.parametrize("double_quant", [False, True])
def test_from_linear_quantizes_the_weight_as_the_format_says(double_quant: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(128, 48, dtype=dtype)
    layer = Linear4bit.from_linear(linear, quant_type="fp4", blocksize=32, double_quant=double_quant)
    expected = reference.quantize(linear.weight.detach(), "fp4", 32, double_quant)
    stored = (layer.weight, layer.absmax, layer.nested_absmax, layer.nested_offset)
    for got, same in zip(stored, expected[:4], strict=True):
        assert (got is None) == (same is None)
        if same is not None:
            assert_same(got.detach(), same)
    assert layer.dtype == dtype
    assert_same(layer.dequantize(), reference.dequantize_4bit(expected, (48, 128), dtype))
    assert_same(layer.dequantize(torch.float32), reference.dequantize_4bit(expected, (48, 128), torch.float32))


def test_from_linear_shares_the_bias_and_leaves_the_linear_as_it_is() -> None:
    linear = nn.Linear(128, 48)
    before = state_bytes(linear)
    layer = Linear4bit.from_linear(linear)
    assert layer.bias is linear.bias
    assert state_bytes(linear) == before
    assert linear.weight.requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_from_linear_keeps_the_training_flag(training: bool) -> None:
    assert Linear4bit.from_linear(nn.Linear(64, 8).train(training)).training is training


def test_a_layer_on_meta_has_all_its_tensors_there() -> None:
    real = make_linear(100, dtype=torch.bfloat16)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()}
    for layer in (
        Linear4bit(100, 48, dtype=torch.bfloat16, device="meta"),
        Linear4bit.from_linear(nn.Linear(100, 48, dtype=torch.bfloat16, device="meta")),
    ):
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()} == expected


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("in_features", [256, 100])
def test_a_layer_without_weight_computes_nan(in_features: int, double_quant: bool) -> None:
    """As one does that a checkpoint, or what loads it, has left out."""
    layer = Linear4bit(in_features, 48, double_quant=double_quant)
    assert layer.dtype == torch.get_default_dtype()
    assert layer.dequantize().isnan().all()
    assert layer(torch.randn(3, in_features)).isnan().all()


@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(0, 64, 8), (3, 0, 8), (3, 64, 0), (0, 0, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_elements(double_quant: bool, rows: int, in_features: int, out_features: int) -> None:
    layer = Linear4bit(in_features, out_features, double_quant=double_quant)
    y, grad_x = with_gradients(layer, [torch.randn(rows, in_features)])
    assert y.shape == (rows, out_features)
    assert_same(grad_x, torch.zeros(rows, in_features))
    assert layer.dequantize().shape == (out_features, in_features)


@by_dtype
@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (2, 0, 256)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x = make_linear(dtype=dtype), torch.randn(shape).to(dtype)

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        return [y.detach(), leaf.grad, layer.bias.grad]

    y, grad_x, grad_bias = results(x)
    flat_y, flat_grad_x, flat_grad_bias = results(x.view(-1, 256))
    assert_same(y, flat_y.view(*shape[:-1], 48))
    assert_same(grad_x, flat_grad_x.view(shape))
    assert_same(grad_bias, flat_grad_bias)


@by_dtype
@pytest.mark.parametrize("training", [False, True])
def test_an_in_place_operation_may_follow(training: bool, dtype: torch.dtype) -> None:
    layer, x = make_linear(dtype=dtype), torch.randn(3, 256).to(dtype)
    with torch.set_grad_enabled(training):
        for in_place in (nn.ReLU(inplace=True), lambda y: y.add_(1), lambda y: y[..., :8].mul_(2)):
            assert_same(in_place(layer(x)), in_place(layer(x).clone()))


def test_weight_and_scales_are_frozen_and_the_bias_is_not() -> None:
    layer = make_linear(double_quant=False)
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.absmax, nn.Parameter)
    assert layer.weight.dtype == torch.uint8
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == {
        "weight": False,
        "absmax": False,
        "bias": True,
    }


def test_an_optimizer_over_all_parameters_changes_the_bias_alone() -> None:
    layer = make_linear()
    before = state_bytes(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(torch.randn(3, 256)).sum().backward()
    optimizer.step()
    after = state_bytes(layer)
    assert {name for name in after if after[name] != before[name]} == {"bias"}


@pytest.mark.parametrize("double_quant", [False, True])
@by_dtype
def test_eval_and_train_alternate(dtype: torch.dtype, double_quant: bool) -> None:
    """bitsandbytes loses the gradient of x once the layer has run in eval mode, and saves a corrupt checkpoint."""
    layer = make_linear(dtype=dtype, double_quant=double_quant)
    x = torch.randn(1, 256).to(dtype)
    expected = with_gradients(layer, [x])
    before = state_bytes(layer)
    for _ in range(2):
        layer.eval()
        with torch.no_grad():
            assert_same(layer(x), expected[0])
        with torch.inference_mode():
            assert_same(layer(x), expected[0])
        layer.train()
        for got, same in zip(with_gradients(layer, [x]), expected, strict=True):
            assert_same(got, same)
    assert state_bytes(layer) == before


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@by_dtype
def test_autocast_casts_x_as_for_an_nn_linear(dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
    layer, x = make_linear(), torch.randn(3, 256).to(dtype)
    with torch.autocast("cpu", dtype=autocast_dtype):
        y, grad_x = with_gradients(layer, [x])
        assert y.dtype == nn.Linear(256, 48)(x).dtype
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == dtype
    expected, expected_grad_x = with_gradients(layer, [x.to(autocast_dtype)])
    assert_same(y, expected)
    assert_same(grad_x, expected_grad_x.to(dtype))


def test_autocast_leaves_float64_alone_so_it_is_refused() -> None:
    x = torch.randn(3, 256, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"linear_4bit.*x.*Double"):
        make_linear()(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    block = nn.Sequential(make_linear(), nn.SiLU(), Linear4bit.from_linear(nn.Linear(48, 256)))

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        block.zero_grad()
        x = normal(3, 256).requires_grad_()
        y = run(x)
        y.sum().backward()
        return [y.detach(), x.grad, block[0].bias.grad, block[2].bias.grad]

    expected = gradients(block)
    results = gradients(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    for got, same in zip(results, expected, strict=True):
        assert_same(got, same)


def test_repr() -> None:
    assert repr(Linear4bit(64, 8, bias=False, quant_type="fp4", blocksize=32, double_quant=False)) == (
        "Linear4bit(in_features=64, out_features=8, bias=False, quant_type=fp4, blocksize=32, double_quant=False)"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant_type": "int4"}, ValueError, "quant_type.*int4"),
        ({"blocksize": 48}, ValueError, "blocksize.*48"),
        ({"dtype": torch.float64}, TypeError, "weight.*Double"),
        ({"dtype": torch.int8}, TypeError, "weight.*Char"),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_constructor_errors(device: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Linear4bit(64, 8, device=device, **options)


@pytest.mark.parametrize("other", [nn.Conv1d(4, 4, 1), Linear4bit(64, 8), "linear"], ids=["conv", "4bit", "str"])
def test_from_linear_takes_an_nn_linear_only(other: object) -> None:
    with pytest.raises(TypeError, match=rf"from_linear.*linear.*{type(other).__name__}"):
        Linear4bit.from_linear(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_from_linear_refuses_a_weight_that_is_not_finite(bad: float) -> None:
    linear = nn.Linear(64, 8)
    nn.init.constant_(linear.weight[3, 5], bad)
    with pytest.raises(ValueError, match=r"weight.*finite"):
        Linear4bit.from_linear(linear)


def test_from_linear_refuses_a_dtype_that_has_no_4bit_form() -> None:
    with pytest.raises(TypeError, match=r"weight.*Double"):
        Linear4bit.from_linear(nn.Linear(64, 8, dtype=torch.float64))


@by_dtype
def test_x_of_the_wrong_width(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"linear_4bit.*x.*256.*255"):
        make_linear()(torch.randn(3, 255, dtype=dtype))


def test_with_weight_shares_bias_and_options_and_leaves_the_layer_as_it_is() -> None:
    layer = make_linear(dtype=torch.bfloat16, double_quant=False)
    before = state_bytes(layer)
    weight = torch.randn(48, 256)
    other = layer.with_weight(weight)
    assert other.bias is layer.bias
    assert (other.dtype, other.double_quant) == (torch.bfloat16, False)
    assert_same(other.weight.detach(), reference.quantize(weight).packed)
    assert state_bytes(layer) == before


@pytest.mark.parametrize("quantized", [False, True])
def test_a_bias_may_come_later(quantized: bool) -> None:
    """To every layer of a model, adapted or not, by assignment or register_parameter."""
    model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False))
    if quantized:
        quantize_model(model)
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, 64)
    before = [model[0](x), model[2](x)]
    with pytest.raises(TypeError, match="cannot assign"):
        model[2].bias = torch.ones(8)
    model[0].bias = nn.Parameter(torch.ones(8))
    model[2].register_parameter("bias", nn.Parameter(torch.ones(8)))
    for layer, same in zip((model[0], model[2]), before, strict=True):
        assert_same(layer(x), same + 1)
    assert {"0.base_layer.bias", "2.bias"} <= model.state_dict().keys()


def test_a_parametrized_bias_is_not_shared() -> None:
    linear = nn.Linear(64, 8)
    register_parametrization(linear, "bias", nn.Softplus())
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'bias'"):
        Linear4bit.from_linear(linear)
