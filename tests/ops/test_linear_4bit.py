from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LINEAR_CASES, LinearCase, normal
from reference import assert_as_exact_as_torch, assert_same, dequantize_4bit, quantize
from torch.autograd import forward_ad

linear_4bit = torch.ops.qlora_ext.linear_4bit
WEIGHT = quantize(normal(48, 256), "nf4", 64, double_quant=True)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_as_exact_as_torch(case: LinearCase, cpu_path: str) -> None:
    m, n, k = case.mnk
    x = torch.randn(m, k).to(case.dtype)
    bias = torch.randn(n).to(case.dtype) if case.bias else None
    exact = F.linear(x.double(), case.weight(torch.float32).double(), None if bias is None else bias.double())
    torch_result = F.linear(x, case.weight(case.dtype), bias)
    assert_as_exact_as_torch(linear_4bit(x, *case.quantized, n, bias), torch_result, exact)


@pytest.mark.parametrize("m", [1, 2, 5, 6, 8, 16, 40])
def test_long_rows_are_as_exact_as_torch(m: int, cpu_path: str) -> None:
    """Their sums are not one chain from end to end."""
    packed = quantize(normal(256, 14336), "nf4", 64, double_quant=True)
    x, weight = torch.randn(m, 14336), dequantize_4bit(packed, (256, 14336), torch.float32)
    exact = F.linear(x.double(), weight.double())
    assert_as_exact_as_torch(linear_4bit(x, *packed, 256, None), F.linear(x, weight), exact)


def test_slices_are_as_exact_as_torch(cpu_path: str) -> None:
    """The last one, too: of 4 rows of the weight it would be multiplied by other means."""
    packed = quantize(normal(4100, 2052), "nf4", 64, double_quant=True)
    x, weight, bias = torch.randn(64, 2052), dequantize_4bit(packed, (4100, 2052), torch.float32), torch.randn(4100)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_as_exact_as_torch(linear_4bit(x, *packed, 4100, bias), F.linear(x, weight, bias), exact)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_parts_that_threads_take_in_turn_are_as_exact_as_torch(num_threads: int, cpu_path: str) -> None:
    """The last one, narrower than the others, too."""
    packed = quantize(normal(1123, 64), "nf4", 64, double_quant=True)
    x, weight, bias = torch.randn(528, 64), dequantize_4bit(packed, (1123, 64), torch.float32), torch.randn(1123)
    exact, torch_result = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
    torch.set_num_threads(num_threads)
    assert_as_exact_as_torch(linear_4bit(x, *packed, 1123, bias), torch_result, exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_hot_rows_read_the_weight_exactly(dtype: torch.dtype, cpu_path: str) -> None:
    """A wrong nibble order, scale or block border shows here as a wrong value at a known place."""
    weight = dequantize_4bit(WEIGHT, (48, 256), torch.float32).T
    x = torch.eye(256, dtype=dtype)
    one_by_one = torch.cat([linear_4bit(row, *WEIGHT, 48, None) for row in x.split(1)])
    for y in (one_by_one, linear_4bit(x, *WEIGHT, 48, None)):
        assert_as_exact_as_torch(y, weight.to(dtype), weight.double())


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (2, 0, 256)])
def test_leading_dimensions(shape: tuple[int, ...], cpu_path: str) -> None:
    x = torch.randn(shape)
    y = linear_4bit(x, *WEIGHT, 48, None)
    assert_same(y, linear_4bit(x.view(-1, 256), *WEIGHT, 48, None).view(*shape[:-1], 48))


@pytest.mark.parametrize("m", [1, 6, 200])
def test_non_contiguous_x_and_bias(m: int, cpu_path: str) -> None:
    bias = torch.randn(96)[::2]
    for x in (torch.randn(256, m).T, torch.randn(m, 512)[:, ::2], torch.randn(1, 256).expand(m, 256)):
        expected = linear_4bit(x.contiguous(), *WEIGHT, 48, bias.contiguous())
        torch.testing.assert_close(linear_4bit(x, *WEIGHT, 48, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m", [1, 40])
def test_nan_and_inf_of_x_stay_in_their_row(m: int, dtype: torch.dtype, cpu_path: str) -> None:
    x = torch.randn(m + 2, 256).to(dtype)
    x[0, 100], x[1, 255] = torch.nan, torch.inf
    y = linear_4bit(x, *WEIGHT, 48, None)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 5)])
def test_gradients(rows: tuple[int, ...], dtype: torch.dtype, cpu_path: str) -> None:
    """grad_x = g @ W, the same bytes as the op linear_4bit_dgrad; grad_bias = g summed over the rows."""
    x = torch.randn(*rows, 256).to(dtype).requires_grad_()
    bias = torch.randn(48).to(dtype).requires_grad_()
    grad = torch.randn(*rows, 48).to(dtype)
    grad_x, grad_bias = torch.autograd.grad(linear_4bit(x, *WEIGHT, 48, bias), (x, bias), grad)
    assert_same(grad_x, torch.ops.qlora_ext.linear_4bit_dgrad(grad, *WEIGHT, 256))
    by_row = grad.view(-1, 48)
    assert_as_exact_as_torch(grad_bias, by_row.sum(0), by_row.double().sum(0))


def test_bias_of_another_dtype_is_cast_and_gets_its_gradient_in_its_own() -> None:
    x, bias = torch.randn(3, 256, dtype=torch.bfloat16), torch.randn(48, requires_grad=True)
    y = linear_4bit(x, *WEIGHT, 48, bias)
    assert_same(y, linear_4bit(x, *WEIGHT, 48, bias.detach().bfloat16()))
    y.sum().backward()
    assert_same(bias.grad, torch.full((48,), 3.0))


@pytest.mark.parametrize("lora", [False, True], ids=["linear", "lora"])
def test_gradient_of_a_bias_in_fp32_is_summed_in_fp32(lora: bool) -> None:
    x, bias, grad = (
        torch.randn(257, 256).bfloat16(),
        torch.randn(48, requires_grad=True),
        torch.randn(257, 48).bfloat16(),
    )
    if lora:
        adapter = [torch.randn(8, 256)], [torch.randn(48, 8)], [1.0], [], None
        y, _ = torch.ops.qlora_ext.lora_linear_4bit(x, *WEIGHT, 48, bias, *adapter)
    else:
        y = linear_4bit(x, *WEIGHT, 48, bias)
    y.backward(grad)
    torch.testing.assert_close(bias.grad, grad.float().sum(0), rtol=1e-6, atol=1e-5)


def test_gradients_only_where_asked() -> None:
    x, bias = torch.randn(4, 256), torch.randn(48)
    assert not linear_4bit(x, *WEIGHT, 48, bias).requires_grad
    for wanted in ({"x": True, "bias": False}, {"x": False, "bias": True}):
        x_, bias_ = x.clone().requires_grad_(wanted["x"]), bias.clone().requires_grad_(wanted["bias"])
        linear_4bit(x_, *WEIGHT, 48, bias_).sum().backward()
        assert {"x": x_.grad is not None, "bias": bias_.grad is not None} == wanted


@pytest.mark.parametrize("grad_mode", [True, False])
def test_tangents_are_refused_not_dropped(grad_mode: bool) -> None:
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        x = forward_ad.make_dual(torch.randn(3, 256), torch.randn(3, 256))
        with pytest.raises(RuntimeError, match="jvp"):
            linear_4bit(x, *WEIGHT, 48, None)


@pytest.mark.parametrize("m", [1, 7, 100])
def test_slices_of_the_batch_agree_with_the_whole(m: int, cpu_path: str) -> None:
    """Few and many rows may take different kernels, whose results differ in the last places only."""
    x = torch.randn(100, 256)
    part, whole = linear_4bit(x[:m], *WEIGHT, 48, None), linear_4bit(x, *WEIGHT, 48, None)[:m]
    # assert_close's tolerances, but of numbers of the usual size, 16, at least: a sum's error does not cancel.
    assert ((part - whole).abs() <= 1e-5 + 1.3e-6 * whole.abs().clamp(min=16)).all()


def test_compile_is_one_graph_forward_and_backward() -> None:
    def step(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.relu(linear_4bit(x * 2, *WEIGHT, 48, bias))

    x, bias = torch.randn(5, 256, requires_grad=True), torch.randn(48, requires_grad=True)
    eager = step(x, bias)
    compiled = torch.compile(step, fullgraph=True)(x, bias)
    assert_same(compiled, eager)
    grad = torch.randn_like(eager)
    grad_x, grad_bias = torch.autograd.grad(compiled, (x, bias), grad)
    eager_grad_x, eager_grad_bias = torch.autograd.grad(eager, (x, bias), grad)
    assert_same(grad_x, eager_grad_x)
    torch.testing.assert_close(grad_bias, eager_grad_bias)


X, BIAS = normal(3, 256), normal(48)
BAD = {
    "x-dtype": ((X.double(), *WEIGHT, 48, None), TypeError, "x: .*Double"),
    "x-columns": ((X[:, 1:], *WEIGHT, 48, None), ValueError, "packed: .*6120.*6144"),
    "x-scalar": ((X[0, 0], *WEIGHT, 48, None), ValueError, "x: "),
    "x-device": ((X.to("meta"), *WEIGHT, 48, None), ValueError, ".*meta"),
    "out-features": ((X, *WEIGHT, 47, None), ValueError, "packed: .*6016.*6144"),
    "out-features-negative": ((X, *WEIGHT, -48, None), ValueError, "out_features: .*-48"),
    "bias-dtype": ((X, *WEIGHT, 48, BIAS.double()), TypeError, "bias: .*Double"),
    "bias-size": ((X, *WEIGHT, 48, BIAS[1:]), ValueError, "bias: .*48.*47"),
    "bias-dimensions": ((X, *WEIGHT, 48, BIAS[None]), ValueError, "bias: "),
    "bias-device": ((X, *WEIGHT, 48, BIAS.to("meta")), ValueError, "bias: .*cpu.*meta"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_errors(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^linear_4bit: {message}"):
        linear_4bit(*arguments)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(double_quant: bool, dtype: torch.dtype) -> None:
    q = quantize(normal(24, 128), "nf4", 64, double_quant)
    x = torch.randn(2, 5, 128).to(dtype).requires_grad_()
    torch.library.opcheck(linear_4bit.default, (x, *q, 24, torch.randn(24).to(dtype).requires_grad_()))
