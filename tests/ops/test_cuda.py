"""On a GPU every op gives the CPU's bytes or is as exact as torch. How the ops run there: test_cuda_calls.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adamw import Ours, gradients, parameters
from cases import DTYPES, LINEAR_CASES, WEIGHT_CASES, LinearCase, WeightCase, normal, quantized_normal
from expert_cases import adapters as expert_adapters
from expert_cases import ends, plain_lora, stack
from lora_cases import RANKS, SHAPES, adapters, fused, plain
from lora_cases import with_gradients as with_lora_gradients
from on_device import cpu, on
from random_layers import make_linear, make_lora, randomize_adapters, state_bytes, with_gradients
from reference import Quantized, assert_as_exact_as_torch, assert_same, quantize
from torch import Tensor, nn

from qlora_ext import Linear4bit, LoraConfig, add_adapter, quantize_model

pytestmark = pytest.mark.needs_cuda

DEVICE = "cuda"
ops = torch.ops.qlora_ext


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_quantize_4bit_gives_the_bytes_of_the_cpu(case: WeightCase) -> None:
    weight = torch.randn(case.shape).to(case.dtype)
    expected = ops.quantize_4bit(weight, case.quant_type, case.blocksize)
    assert_same(cpu(ops.quantize_4bit(weight.to(DEVICE), case.quant_type, case.blocksize)), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantize_4bit_over_the_whole_range_of_the_dtype(dtype: torch.dtype, quant_type: str) -> None:
    """Subnormal absmax and reciprocals, the largest float, zeros, NaN and Inf."""
    largest = torch.finfo(dtype).max
    magnitudes = torch.cat([2.0 ** torch.linspace(-149, 127, 277), torch.tensor([1e-38, largest, 0.0])])
    weight = (torch.rand(280, 64) * 2 - 1) * magnitudes[:, None]
    weight = torch.cat([weight.clamp(-largest, largest), torch.tensor([[torch.nan], [torch.inf]]).expand(2, 64)])
    weight = weight.to(dtype)
    assert_same(cpu(ops.quantize_4bit(weight.to(DEVICE), quant_type, 64)), ops.quantize_4bit(weight, quant_type, 64))


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-60, 1.0, 2.0**120])
@pytest.mark.parametrize("shape", [(1000, 64), (3, 1001), (257,), (1,), (), (0,), (4, 2**20)])
def test_quantize_absmax_gives_the_bytes_of_the_cpu(shape: tuple[int, ...], scale: float) -> None:
    absmax = torch.rand(shape) * scale
    assert_same(cpu(ops.quantize_absmax(absmax.to(DEVICE))), ops.quantize_absmax(absmax))


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_dequantize_4bit_gives_the_values_of_the_cpu(case: WeightCase) -> None:
    q = quantize(torch.randn(case.shape), case.quant_type, case.blocksize, case.double_quant)
    expected = ops.dequantize_4bit(*q, case.shape, case.dtype)
    assert_same(cpu(ops.dequantize_4bit(*on(DEVICE, q), case.shape, case.dtype)), expected)


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_adamw_step_gives_the_bytes_of_the_cpu(dtype: torch.dtype, is_8bit: bool) -> None:
    params = parameters(dtype)
    here, there = Ours(params, is_8bit=is_8bit), Ours(params, is_8bit=is_8bit).to(DEVICE)
    for step in range(1, 4):
        grads = gradients(step, params)
        scale, found_inf = torch.tensor(3.0), torch.tensor(float(step == 2))
        here.step(step, grads, grad_scale=scale, found_inf=found_inf, seed=1)
        there.step(step, on(DEVICE, grads), grad_scale=on(DEVICE, scale), found_inf=on(DEVICE, found_inf), seed=1)
    for got, expected in zip(there.tensors(), here.tensors(), strict=True):
        assert torch.equal(cpu(got), expected)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_4bit_is_as_exact_as_torch(case: LinearCase) -> None:
    m, n, k = case.mnk
    x = torch.randn(m, k).to(case.dtype)
    bias = torch.randn(n).to(case.dtype) if case.bias else None
    exact = F.linear(x.double(), case.weight(torch.float32).double(), None if bias is None else bias.double())
    torch_result = F.linear(*on(DEVICE, (x, case.weight(case.dtype), bias)))
    y = ops.linear_4bit(x.to(DEVICE), *on(DEVICE, case.quantized), n, on(DEVICE, bias))
    assert_as_exact_as_torch(y.cpu(), torch_result.cpu(), exact)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear_4bit_dgrad_is_as_exact_as_torch(case: LinearCase) -> None:
    m, n, k = case.mnk
    grad = torch.randn(m, n).to(case.dtype)
    exact = grad.double() @ case.weight(torch.float32).double()
    torch_result = grad.to(DEVICE) @ case.weight(case.dtype).to(DEVICE)
    grad_x = ops.linear_4bit_dgrad(grad.to(DEVICE), *on(DEVICE, case.quantized), k)
    assert_as_exact_as_torch(grad_x.cpu(), torch_result.cpu(), exact)


@pytest.mark.parametrize("shape", [(), (0, 3), (1000,), (300, 4097)], ids=str)
def test_dropout_mask_is_that_of_the_cpu(shape: tuple[int, ...]) -> None:
    x, seed = torch.empty(shape), torch.tensor(7)
    for keep in (0.0, 0.9, 1 - 2**-33, 1.0):
        assert_same(ops.dropout_mask(*on(DEVICE, (x, keep, seed))).cpu(), ops.dropout_mask(x, keep, seed))


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_lora_linear_4bit_and_its_gradients_are_as_exact_as_torch(
    dtype: torch.dtype, shape: str, dropout: bool
) -> None:
    m, n, k = SHAPES[shape]
    q = quantized_normal((n, k), "nf4", 64, double_quant=True)
    a, b, scaling = adapters(RANKS["r5-r16"], n, k)
    leaves = [torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), *a, *b]
    keep, seed = ([0.7] * len(a), torch.arange(len(a))) if dropout else ([], None)
    grad = torch.randn(m, n).to(dtype)
    weight = ops.dequantize_4bit(*q, (n, k), torch.float32)

    there = on(DEVICE, (leaves, grad, weight.to(dtype), seed))
    results = with_lora_gradients(fused(on(DEVICE, q), n, scaling, keep, there[3]), *there[:2])
    low = with_lora_gradients(plain(there[2], scaling, keep, there[3]), *there[:2])
    exact = with_lora_gradients(plain(weight.double(), scaling, keep, seed), [leaf.double() for leaf in leaves], grad)
    for got, torch_result, exact_result in zip(results, low, exact, strict=True):
        assert_as_exact_as_torch(got.cpu(), torch_result.cpu(), exact_result)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_experts_and_their_gradients_are_as_exact_as_torch(dtype: torch.dtype, is_transposed: bool) -> None:
    q, weight = stack(256, 192, is_transposed)
    a, b, scaling = expert_adapters((8,), 256, 192)
    leaves, offs = [torch.randn(84, 256).to(dtype), *a, *b], ends(3, 0, 70, 8)
    grad = torch.randn(84, 192).to(dtype)

    def results(device: str, compute: torch.dtype | None) -> list[Tensor]:
        x, *ab = (t.to(device, compute if t.dtype == dtype else None).requires_grad_() for t in leaves)
        if compute is None:
            y, _ = ops.lora_experts_4bit(
                x, *on(device, q), offs.to(device), 192, is_transposed, ab[:1], ab[1:], scaling
            )
        else:
            y, _ = plain_lora(x, weight.to(device, compute), offs, ab, scaling)
        return [y.detach().cpu(), *cpu(torch.autograd.grad(y, [x, *ab], grad.to(device, y.dtype)))]

    exact = results("cpu", torch.float64)
    for each in zip(results(DEVICE, None), results(DEVICE, dtype), exact, strict=True):
        assert_as_exact_as_torch(*each)


@pytest.mark.parametrize("m", [1, 5, 100])
def test_misaligned_and_non_contiguous_tensors(m: int) -> None:
    """What the fused kernels cannot load 16 bytes at a time goes another way to the same result."""
    q = on(DEVICE, quantized_normal((48, 256), "nf4", 64, double_quant=True))
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in q[:2]]
    x = normal(m, 256).to(DEVICE, torch.bfloat16)
    grad = normal(m, 48).to(DEVICE, torch.bfloat16)
    decoded = ops.dequantize_4bit(*q, (48, 256), torch.bfloat16)
    weight = ops.dequantize_4bit(*q, (48, 256), torch.float32).double()
    assert_same(ops.dequantize_4bit(*shifted, *q[2:], (48, 256), torch.bfloat16), decoded)
    for x_view in (x, torch.stack([x, -x], 2)[..., 0], torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)):
        y = ops.linear_4bit(x_view, *shifted, *q[2:], 48, None)
        assert_as_exact_as_torch(y, F.linear(x, decoded), x.double() @ weight.T)
    grad_x = ops.linear_4bit_dgrad(torch.stack([grad, -grad], 2)[..., 0], *shifted, *q[2:], 256)
    assert_as_exact_as_torch(grad_x, grad @ decoded, grad.double() @ weight)


@pytest.mark.slow
def test_expert_stack_of_more_than_2_31_elements() -> None:
    """128 experts are 2^31 weights; of one more, every index is beyond 31 bits. The last differs from the others."""
    one = normal(4096, 4096, dtype=torch.bfloat16)
    stack = one.to(DEVICE).repeat(129, 1, 1)
    stack[-1].neg_()
    packed, absmax = ops.quantize_4bit(stack, "nf4", 64)
    del stack
    scales = ops.quantize_absmax(absmax)
    decoded = ops.dequantize_4bit(packed, *scales, "nf4", 64, (129, 4096, 4096), torch.bfloat16)
    for expert, weight in ((0, one), (64, one), (127, one), (128, -one)):
        expected = ops.quantize_4bit(weight, "nf4", 64)
        assert_same(cpu((packed[expert], absmax[expert])), expected)
    assert (packed[:-1] == packed[0]).all()
    on_cpu = ops.quantize_absmax(absmax.cpu())
    assert_same(cpu(scales), on_cpu)
    for expert in (0, 127, 128):
        groups = slice(expert * 1024, (expert + 1) * 1024)  # of 256 blocks of 64
        q = Quantized(packed[expert].cpu(), on_cpu[0][expert], on_cpu[1][groups], on_cpu[2], "nf4", 64)
        assert_same(decoded[expert].cpu(), ops.dequantize_4bit(*q, (4096, 4096), torch.bfloat16))


@pytest.mark.parametrize("in_features", [256, 100], ids=["rows", "flat"])
def test_layer_moves_and_quantizes_there_as_here(in_features: int) -> None:
    linear = nn.Linear(in_features, 48)
    layer = Linear4bit.from_linear(linear)
    expected, x = state_bytes(layer), torch.randn(7, in_features)
    y = layer(x)
    moved = layer.to(DEVICE)
    assert {t.device.type for t in moved.state_dict().values()} == {DEVICE}
    torch.testing.assert_close(moved(x.to(DEVICE)).cpu(), y, rtol=1e-4, atol=1e-5)
    assert state_bytes(moved.cpu()) == expected
    assert state_bytes(Linear4bit.from_linear(linear.to(DEVICE)).cpu()) == expected


@pytest.mark.parametrize("m", [1, 5, 100])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_backward_through_an_adapted_layer(dtype: torch.dtype, m: int) -> None:
    """Against a dense layer in fp64, and no less exact than the same dense layer in the dtype."""
    layer = make_lora(make_linear(256, dtype=dtype), LoraConfig(r=8), LoraConfig(r=4))
    x, grad = torch.randn(m, 256).to(dtype), torch.randn(m, 48).to(dtype)
    A, B, scaling = list(layer.lora_A.values()), list(layer.lora_B.values()), list(layer.scaling.values())
    weight, bias = layer.base_layer.dequantize(torch.float32), layer.base_layer.bias

    def dense(x: Tensor, *ab: Tensor) -> Tensor:
        y = F.linear(x, weight.to(x), bias.to(x))
        for a, b, scale in zip(ab[:2], ab[2:], scaling, strict=True):
            y = y + scale * F.linear(F.linear(x, a.to(x)), b.to(x))
        return y

    exact = with_gradients(dense, [t.double() for t in (x, *A, *B)], grad)
    low = with_gradients(dense, on(DEVICE, (x, *A, *B)), grad.to(DEVICE))
    layer.to(DEVICE)
    there = x.to(DEVICE).requires_grad_()
    y = layer(there)
    y.backward(grad.to(DEVICE))
    results = [y.detach(), there.grad, *(p.grad for p in (*layer.lora_A.values(), *layer.lora_B.values()))]
    for got, torch_result, exact_result in zip(results, low, exact, strict=True):
        assert_as_exact_as_torch(got.cpu(), torch_result.cpu(), exact_result)


def test_model_trains_there_as_here() -> None:
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(inplace=True), nn.Linear(96, 64, bias=False))
    add_adapter(quantize_model(model), LoraConfig(r=4))
    randomize_adapters(model)
    there, x = copy.deepcopy(model).to(DEVICE), torch.randn(5, 128)
    model(x).square().mean().backward()
    there(x.to(DEVICE)).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in gradients} == {"lora_A", "lora_B"}
    moved = {name: cpu(p.grad) for name, p in there.named_parameters() if p.grad is not None}
    torch.testing.assert_close(moved, gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer, x = make_linear().to(DEVICE), normal(3, 256).to(DEVICE)
    with torch.autocast("cuda", dtype):
        y = layer(x)
    assert_same(y, layer(x.to(dtype)))
