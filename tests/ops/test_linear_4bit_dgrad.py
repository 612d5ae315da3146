from __future__ import annotations

import pytest
import torch
from cases import LINEAR_CASES, LinearCase, normal
from reference import assert_as_exact_as_torch, assert_same, dequantize_4bit, quantize

linear_4bit_dgrad = torch.ops.qlora_ext.linear_4bit_dgrad
WEIGHT = quantize(normal(48, 256), "nf4", 64, double_quant=True)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_as_exact_as_torch(case: LinearCase, cpu_path: str) -> None:
    m, n, k = case.mnk
    grad = torch.randn(m, n).to(case.dtype)
    exact = grad.double() @ case.weight(torch.float32).double()
    assert_as_exact_as_torch(linear_4bit_dgrad(grad, *case.quantized, k), grad @ case.weight(case.dtype), exact)


@pytest.mark.parametrize("m", [1, 4, 8, 16, 40])
def test_long_rows_are_as_exact_as_torch(m: int, cpu_path: str) -> None:
    packed = quantize(normal(14336, 128), "nf4", 64, double_quant=True)
    grad, weight = torch.randn(m, 14336), dequantize_4bit(packed, (14336, 128), torch.float32)
    exact = grad.double() @ weight.double()
    assert_as_exact_as_torch(linear_4bit_dgrad(grad, *packed, 128), grad @ weight, exact)


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 9, 17, 32, 33])
def test_few_rows_in_bf16(m: int, blocksize: int, cpu_path: str) -> None:
    """Weights come in pairs along an odd number of rows, and 1408 columns in chunks and strips."""
    packed = quantize(normal(71, 1408), "nf4", blocksize, double_quant=True)
    grad = torch.randn(m, 71).bfloat16()
    exact = grad.double() @ dequantize_4bit(packed, (71, 1408), torch.float32).double()
    torch_result = grad @ dequantize_4bit(packed, (71, 1408), torch.bfloat16)
    assert_as_exact_as_torch(linear_4bit_dgrad(grad, *packed, 1408), torch_result, exact)


def test_slices_are_as_exact_as_torch(cpu_path: str) -> None:
    """The last one, too: of 4 columns it would be multiplied by other means."""
    packed = quantize(normal(2048, 4100), "nf4", 64, double_quant=True)
    grad, weight = torch.randn(64, 2048), dequantize_4bit(packed, (2048, 4100), torch.float32)
    exact = grad.double() @ weight.double()
    assert_as_exact_as_torch(linear_4bit_dgrad(grad, *packed, 4100), grad @ weight, exact)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (2, 0, 48)])
def test_leading_dimensions(shape: tuple[int, ...], cpu_path: str) -> None:
    grad = torch.randn(shape)
    grad_x = linear_4bit_dgrad(grad, *WEIGHT, 256)
    assert_same(grad_x, linear_4bit_dgrad(grad.view(-1, 48), *WEIGHT, 256).view(*shape[:-1], 256))


@pytest.mark.parametrize("m", [1, 6, 200])
def test_non_contiguous_grad(m: int, cpu_path: str) -> None:
    for grad in (torch.randn(48, m).T, torch.randn(m, 96)[:, ::2], torch.ones(()).expand(m, 48)):
        expected = linear_4bit_dgrad(grad.contiguous(), *WEIGHT, 256)
        torch.testing.assert_close(linear_4bit_dgrad(grad, *WEIGHT, 256), expected)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_overflows_with_absmax_alone_does_not(dtype: torch.dtype, m: int, cpu_path: str) -> None:
    weight = torch.zeros(1, 64)
    weight[0, :3] = torch.tensor([4.0, 1.3488, -0.3644])
    q = quantize(weight, "nf4", 64, double_quant=False)
    grad = torch.full((m, 1), 2e38, dtype=dtype)
    expected = grad @ dequantize_4bit(q, (1, 64), dtype)
    assert expected[0, 1].isfinite()
    torch.testing.assert_close(linear_4bit_dgrad(grad, *q, 64), expected)


@pytest.mark.parametrize(("k", "blocksize"), [(1536, 512), (12288, 4096)])
def test_a_threads_part_may_begin_inside_a_block(k: int, blocksize: int, cpu_path: str) -> None:
    q, grad = quantize(normal(1024, k), "nf4", blocksize, double_quant=False), normal(3, 1024)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(linear_4bit_dgrad(grad, *q, k))
    for other in results[1:]:
        assert_same(other, results[0])


GRAD = normal(3, 48)
BAD = {
    "grad-dtype": ((GRAD.double(), *WEIGHT, 256), TypeError, "grad: .*Double"),
    "grad-columns": ((GRAD[:, 1:], *WEIGHT, 256), ValueError, "packed: .*6016.*6144"),
    "grad-scalar": ((GRAD[0, 0], *WEIGHT, 256), ValueError, "grad: "),
    "grad-device": ((GRAD.to("meta"), *WEIGHT, 256), ValueError, ".*meta"),
    "in-features": ((GRAD, *WEIGHT, 255), ValueError, "packed: .*6120.*6144"),
    "in-features-negative": ((GRAD, *WEIGHT, -256), ValueError, "in_features: .*-256"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_errors(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^linear_4bit_dgrad: {message}"):
        linear_4bit_dgrad(*arguments)


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(double_quant: bool) -> None:
    q = quantize(normal(24, 128), "nf4", 64, double_quant)
    torch.library.opcheck(linear_4bit_dgrad.default, (torch.randn(2, 5, 24), *q, 128))
