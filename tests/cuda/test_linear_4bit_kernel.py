"""linear_4bit's fused kernel: exact on integers, near on random values; what it reads, and how."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import QUANT_TYPES, normal, quantized_normal
from evidence import (
    assert_partial_sums_are_fenced,
    assert_table_lookups_do_not_conflict,
    assert_weight_is_read_once,
)
from launcher import Device, under_schedules
from products import DTYPES, ProductCase, cases, exact_product, random_product, table_values
from recorded_gpu import LaunchError, Limits
from reference import assert_as_exact_as_torch, assert_same
from torch import Tensor

# M around the borders of mma's 8 columns and of each configuration; N below, at and beyond tiles of 16 rows and more.
SHAPES = [
    (1, 2, 256),
    (1, 130, 512),
    (2, 18, 512),
    (7, 64, 256),
    (8, 16, 512),
    (9, 142, 256),
    (15, 32, 256),
    (16, 258, 512),
    (17, 34, 256),
    (24, 80, 512),
    (31, 14, 256),
    (32, 258, 256),
    (33, 48, 512),
    (47, 30, 256),
    (63, 66, 256),
    (64, 272, 256),
]
# Several steps of a tile, so that a CTA begins and ends within one.
LONG_SHAPES = [(1, 272, 2048), (5, 34, 4096), (16, 130, 2560), (20, 48, 2048), (64, 274, 1280)]
# Rows that end within a step, a quantum of 64 and a run of absmax.
SHORT_ROWS = [
    ((1, 34, 32), 32), ((3, 18, 96), 32), ((17, 18, 160), 32), ((40, 20, 224), 32), ((2, 40, 64), 64),
    ((9, 18, 192), 64), ((33, 36, 576), 64), ((4, 20, 384), 128), ((20, 20, 640), 128), ((6, 18, 768), 256),
]  # fmt: skip
KIND = ProductCase((1, 34, 2048), "bf16", "nf4", 64, double_quant=True, bias=True, num_sms=4)


def check_exact(case: ProductCase, device: Device | None = None) -> Device:
    exact, device = exact_product(case), device or Device(Limits(case.num_sms))
    x, bias = exact.factor(case.mnk[2]), exact.bias()
    assert_same(device.linear_4bit(x, exact.q, case.mnk[1], bias), exact.expected(x, exact.weight.T, bias))
    return device


@pytest.mark.parametrize("case", cases(SHAPES, (1, 4, 132), (False, True)), ids=str)
def test_exact_on_integers(case: ProductCase) -> None:
    check_exact(case)


@pytest.mark.parametrize("case", cases(LONG_SHAPES, (1, 2, 3, 132), (False, True)), ids=str)
def test_exact_on_integers_where_ctas_share_a_tile(case: ProductCase) -> None:
    check_exact(case)


@pytest.mark.parametrize("double_quant", [False, True], ids=["fp32", "dq"])
@pytest.mark.parametrize(("mnk", "blocksize"), SHORT_ROWS, ids=str)
def test_rows_that_end_within_a_step(mnk: tuple[int, int, int], blocksize: int, double_quant: bool) -> None:
    check_exact(replace(KIND, mnk=mnk, blocksize=blocksize, double_quant=double_quant))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("mnk", [(1, 48, 1024), (16, 32, 2048), (33, 40, 512), (64, 32, 512)], ids=str)
def test_as_exact_as_torch(mnk: tuple[int, int, int], dtype_name: str, quant_type: str) -> None:
    case = replace(KIND, mnk=mnk, dtype_name=dtype_name, quant_type=quant_type)
    q, x = random_product(case, mnk[2])
    bias = normal(mnk[1], dtype=case.dtype, seed=3)
    y = Device(Limits(3)).linear_4bit(x, q, mnk[1], bias)
    exact = x.double() @ case.weight(torch.float32).double().T + bias.double()
    assert_as_exact_as_torch(y, F.linear(x, case.weight(case.dtype), bias), exact)


@pytest.mark.parametrize("case", [
    replace(KIND, mnk=(3, 34, 2048)),
    replace(KIND, mnk=(16, 18, 1280), dtype_name="fp16", double_quant=False),
    replace(KIND, mnk=(20, 18, 1056), blocksize=32),
    replace(KIND, mnk=(40, 18, 1280), quant_type="fp4", blocksize=256),
], ids=str)  # fmt: skip
def test_every_schedule_gives_the_same_bytes(case: ProductCase) -> None:
    """Of random values, whose sum depends on its order."""
    q, x = random_product(case, case.mnk[2])

    def run(device: Device) -> Tensor:
        y = device.linear_4bit(x, q, case.mnk[1])
        assert device.results[0].traffic["workspace"].atomics > 1
        return y

    under_schedules(run, limits=Limits(3))


@pytest.mark.parametrize("garbage", [0x00, 0x01, 0xFF])
def test_workspace_may_hold_anything(garbage: int) -> None:
    device = check_exact(KIND, Device(Limits(3), workspace=garbage))
    assert device.results[0].traffic["workspace"].atomics > 1


def test_no_workspace_where_no_tile_is_shared() -> None:
    device = check_exact(replace(KIND, mnk=(1, 130, 256)), Device(Limits(1)))
    assert "workspace" not in device.results[0].traffic


def test_least_alignment() -> None:
    offsets = {"x": 16, "packed": 16, "absmax": 16, "nested_absmax": 4, "nested_offset": 4, "bias": 2, "out": 2}
    for double_quant in (False, True):
        check_exact(replace(KIND, double_quant=double_quant), Device(Limits(3), offsets={**offsets, "workspace": 16}))


@pytest.mark.parametrize("shared_bytes", [100 * 1024, 164 * 1024, 228 * 1024], ids=["sm86", "sm80", "sm90"])
@pytest.mark.parametrize("m", [1, 64])
def test_every_architecture_has_the_shared_memory(m: int, shared_bytes: int) -> None:
    check_exact(replace(KIND, mnk=(m, 34, 512)), Device(Limits(3, shared_bytes)))


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("mnk", [(1, 256, 4096), (8, 128, 2048), (16, 256, 2048)], ids=str)
def test_weight_is_read_once(mnk: tuple[int, int, int], dtype_name: str) -> None:
    device = check_exact(replace(KIND, mnk=mnk, dtype_name=dtype_name), Device(Limits(1)))
    [result] = device.results
    assert_weight_is_read_once(result)
    assert_table_lookups_do_not_conflict(result)


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_without_a_dynamic_codebook_no_load_conflicts(m: int, blocksize: int) -> None:
    device = check_exact(replace(KIND, mnk=(m, 128, 1024), blocksize=blocksize, double_quant=False))
    assert_table_lookups_do_not_conflict(device.results[0])
    assert [site for site in device.results[0].banks if site.degree > 1 and site.instruction.startswith("ld")] == []


def test_partial_sums_are_fenced() -> None:
    assert_partial_sums_are_fenced("18linear_4bit_kernel")


REFUSED = {
    "fp32": ((2, 4, 64), torch.float32, 64, {}),
    "no-rows": ((0, 4, 64), torch.bfloat16, 64, {}),
    "many-rows": ((65, 4, 64), torch.bfloat16, 64, {}),
    "odd-N": ((2, 5, 64), torch.bfloat16, 64, {}),
    "no-N": ((2, 0, 64), torch.bfloat16, 64, {}),
    "blocksize": ((2, 4, 512), torch.bfloat16, 512, {}),
    "K": ((2, 4, 96), torch.bfloat16, 64, {}),
    "x": ((2, 4, 64), torch.bfloat16, 64, {"x": 8}),
    "packed": ((2, 4, 64), torch.bfloat16, 64, {"packed": 8}),
    "absmax": ((2, 4, 64), torch.bfloat16, 64, {"absmax": 4}),
}


@pytest.mark.parametrize(("mnk", "dtype", "blocksize", "offsets"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_does_not_take(
    mnk: tuple[int, int, int], dtype: torch.dtype, blocksize: int, offsets: dict[str, int]
) -> None:
    m, n, k = mnk
    x, q = torch.zeros(m, k, dtype=dtype), quantized_normal((n, k), "nf4", blocksize, False)
    device = Device(offsets=offsets)
    assert not device.takes_fused(x, q, mnk)
    with pytest.raises(LaunchError, match="linear_4bit: CUDA error 1"):
        device.linear_4bit(x, q, n)
    assert not device.results


def test_what_the_kernel_takes() -> None:
    for m, dtype in ((1, torch.float16), (64, torch.bfloat16)):
        assert Device().takes_fused(
            torch.zeros(m, 512, dtype=dtype), quantized_normal((2, 512), "fp4", 256, True), (m, 2, 512)
        )


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("kind", ["ones", "relu"])
def test_long_sums_of_inputs_that_have_a_mean(kind: str, dtype_name: str) -> None:
    """What is wrong with a code adds up here, as it does not where x has both signs."""
    case = replace(KIND, mnk=(2, 16, 14336), dtype_name=dtype_name)
    q, x = random_product(case, case.mnk[2])
    x = torch.ones_like(x) if kind == "ones" else x.relu()
    exact = F.linear(x.double(), case.weight(torch.float32).double())
    y = Device(Limits(4)).linear_4bit(x, q, case.mnk[1])
    assert_as_exact_as_torch(y, F.linear(x, case.weight(case.dtype)), exact)


def test_a_cta_with_two_unfinished_tiles() -> None:
    """Its first and its last: each has a place of its own for the partial sum, which others read when it is done."""
    check_exact(replace(KIND, mnk=(1, 5 * 128, 3072)), Device(Limits(3, 100 * 1024), block_order="reverse"))


@pytest.mark.parametrize(("dtype", "nearest", "most"), [(torch.bfloat16, 1.5e-4, 4e-5), (torch.float16, 1e-5, 2e-6)])
def test_errors_of_the_codes_cancel(dtype: torch.dtype, nearest: float, most: float) -> None:
    """Of normal weights, per absmax: what rounding NF4's codes to nearest leaves, and what the kernels' table does."""
    packed = quantized_normal((1024, 4096), "nf4", 64, False).packed.long()
    codes = torch.stack([packed >> 4, packed & 15]).flatten()
    exact = reference.codebook("nf4").double()
    assert (exact.to(dtype).double() - exact)[codes].mean().abs() > nearest
    assert (table_values("nf4", dtype) - exact)[codes].mean().abs() < most
