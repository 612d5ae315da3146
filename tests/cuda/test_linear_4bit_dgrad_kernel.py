"""linear_4bit_dgrad's fused kernel: exact on integers, near on random values; what it reads, and how."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import QUANT_TYPES, quantized_normal
from evidence import (
    assert_partial_sums_are_fenced,
    assert_table_lookups_do_not_conflict,
    assert_weight_is_read_once,
)
from launcher import Device, under_schedules
from products import DTYPES, ProductCase, cases, exact_product, random_product
from recorded_gpu import LaunchError, Limits
from reference import assert_as_exact_as_torch, assert_same
from torch import Tensor

# M around the borders of each configuration; N, the length of the sum, below, at and beyond units of 64 rows of the
# weight and chunks of 128 and 256; rows of N % 8 != 0 are copied in small pieces.
SHAPES = [
    (1, 2, 256),
    (1, 130, 512),
    (3, 64, 256),
    (4, 258, 256),
    (5, 34, 768),
    (7, 128, 256),
    (8, 66, 512),
    (9, 18, 256),
    (15, 256, 512),
    (16, 142, 256),
    (17, 48, 256),
    (31, 510, 256),
    (32, 72, 768),
    (33, 130, 256),
    (63, 62, 256),
    (64, 136, 512),
]
# Several units of a tile, so that a CTA begins and ends within one.
LONG_SHAPES = [(1, 512, 1280), (3, 322, 2304), (8, 500, 512), (16, 512, 768), (24, 264, 512), (64, 448, 512)]
# Rows that end within a tile, a lane's two blocks and a run of absmax.
SHORT_ROWS = [
    ((1, 34, 32), 32), ((3, 18, 96), 32), ((17, 18, 160), 32), ((40, 20, 1056), 32), ((2, 40, 64), 64),
    ((9, 18, 192), 64), ((33, 36, 576), 64), ((4, 20, 384), 128), ((20, 20, 640), 128), ((6, 18, 1280), 256),
]  # fmt: skip
KIND = ProductCase((1, 448, 512), "bf16", "nf4", 64, double_quant=True, bias=False, num_sms=4)


def check_exact(case: ProductCase, device: Device | None = None) -> Device:
    exact, device = exact_product(case), device or Device(Limits(case.num_sms))
    grad = exact.factor(case.mnk[1])
    assert_same(device.linear_4bit_dgrad(grad, exact.q, case.mnk[2]), exact.expected(grad, exact.weight))
    return device


@pytest.mark.parametrize("case", cases(SHAPES, (1, 4, 132), (False,)), ids=str)
def test_exact_on_integers(case: ProductCase) -> None:
    check_exact(case)


@pytest.mark.parametrize("case", cases(LONG_SHAPES, (1, 2, 3, 132), (False,)), ids=str)
def test_exact_on_integers_where_ctas_share_a_tile(case: ProductCase) -> None:
    check_exact(case)


@pytest.mark.parametrize("double_quant", [False, True], ids=["fp32", "dq"])
@pytest.mark.parametrize(("mnk", "blocksize"), SHORT_ROWS, ids=str)
def test_rows_that_end_within_a_tile(mnk: tuple[int, int, int], blocksize: int, double_quant: bool) -> None:
    check_exact(replace(KIND, mnk=mnk, blocksize=blocksize, double_quant=double_quant))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("mnk", [(1, 512, 512), (8, 256, 512), (16, 512, 256), (64, 256, 256)], ids=str)
def test_as_exact_as_torch(mnk: tuple[int, int, int], dtype_name: str, quant_type: str) -> None:
    case = replace(KIND, mnk=mnk, dtype_name=dtype_name, quant_type=quant_type)
    q, grad = random_product(case, mnk[1])
    grad_x = Device(Limits(3)).linear_4bit_dgrad(grad, q, mnk[2])
    exact = grad.double() @ case.weight(torch.float32).double()
    assert_as_exact_as_torch(grad_x, grad @ case.weight(case.dtype), exact)


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_small_gradients(dtype_name: str) -> None:
    """Of 1e-4 times a weight of 0.02: in fp16 their products with a scale alone would be subnormal."""
    case = replace(KIND, mnk=(4, 256, 256), dtype_name=dtype_name)
    q, grad = random_product(case, 256)
    grad = grad * 1e-4
    grad_x = Device(Limits(3)).linear_4bit_dgrad(grad, q, 256)
    exact = grad.double() @ case.weight(torch.float32).double()
    assert_as_exact_as_torch(grad_x, grad @ case.weight(case.dtype), exact)


@pytest.mark.parametrize("case", [
    replace(KIND, mnk=(1, 322, 256)),
    replace(KIND, mnk=(7, 130, 512), dtype_name="fp16", double_quant=False),
    replace(KIND, mnk=(16, 264, 256), blocksize=32),
    replace(KIND, mnk=(40, 258, 256), quant_type="fp4", blocksize=256),
], ids=str)  # fmt: skip
def test_every_schedule_gives_the_same_bytes(case: ProductCase) -> None:
    """Of random values, whose sum depends on its order."""
    q, grad = random_product(case, case.mnk[1])

    def run(device: Device) -> Tensor:
        grad_x = device.linear_4bit_dgrad(grad, q, case.mnk[2])
        assert device.results[0].traffic["workspace"].atomics > 1
        return grad_x

    under_schedules(run, limits=Limits(2))


@pytest.mark.parametrize("garbage", [0x00, 0x01, 0xFF])
def test_workspace_may_hold_anything(garbage: int) -> None:
    device = check_exact(KIND, Device(Limits(3), workspace=garbage))
    assert device.results[0].traffic["workspace"].atomics > 1


def test_no_workspace_where_no_tile_is_shared() -> None:
    device = check_exact(replace(KIND, mnk=(1, 32, 256)), Device(Limits(1)))
    assert "workspace" not in device.results[0].traffic


def test_least_alignment() -> None:
    offsets = {"x": 16, "packed": 16, "absmax": 16, "nested_absmax": 4, "nested_offset": 4, "workspace": 16}
    for double_quant in (False, True):
        check_exact(replace(KIND, double_quant=double_quant), Device(Limits(3), offsets=offsets))


@pytest.mark.parametrize("shared_bytes", [100 * 1024, 164 * 1024, 228 * 1024], ids=["sm86", "sm80", "sm90"])
@pytest.mark.parametrize("m", [1, 64])
def test_every_architecture_has_the_shared_memory(m: int, shared_bytes: int) -> None:
    check_exact(replace(KIND, mnk=(m, 128, 512)), Device(Limits(3, shared_bytes)))


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("mnk", [(1, 512, 2048), (4, 256, 4096), (8, 256, 2048), (16, 256, 2048)], ids=str)
def test_weight_is_read_once(mnk: tuple[int, int, int], dtype_name: str) -> None:
    [result] = check_exact(replace(KIND, mnk=mnk, dtype_name=dtype_name), Device(Limits(1))).results
    assert_weight_is_read_once(result)
    assert_table_lookups_do_not_conflict(result)


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
def test_without_a_dynamic_codebook_no_load_conflicts(m: int, blocksize: int) -> None:
    device = check_exact(replace(KIND, mnk=(m, 128, 1024), blocksize=blocksize, double_quant=False))
    assert_table_lookups_do_not_conflict(device.results[0])
    assert [site for site in device.results[0].banks if site.degree > 1 and site.instruction.startswith("ld")] == []


def test_partial_sums_are_fenced() -> None:
    assert_partial_sums_are_fenced("linear_4bit_dgrad_kernel")


@pytest.mark.parametrize("mnk", [(0, 4, 64), (65, 4, 64), (2, 5, 64), (2, 4, 96)], ids=str)
def test_what_the_kernel_does_not_take(mnk: tuple[int, int, int]) -> None:
    m, n, k = mnk
    device = Device()
    with pytest.raises(LaunchError, match="linear_4bit_dgrad: CUDA error 1"):
        device.linear_4bit_dgrad(torch.zeros(m, n).bfloat16(), quantized_normal((n, k), "nf4", 64, False), k)
    assert not device.results


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_long_sums_of_a_constant_gradient(dtype_name: str) -> None:
    """As y.sum().backward() gives: what is wrong with a code adds up."""
    case = replace(KIND, mnk=(2, 7168, 128), dtype_name=dtype_name)
    q, grad = random_product(case, case.mnk[1])
    grad = torch.ones_like(grad)
    exact = grad.double() @ case.weight(torch.float32).double()
    got = Device(Limits(4)).linear_4bit_dgrad(grad, q, case.mnk[2])
    assert_as_exact_as_torch(got, grad @ case.weight(case.dtype), exact)


@pytest.mark.parametrize("mnk", [(1, 8192, 8192), (64, 4096, 4096), (64, 1024, 1024), (16, 28672, 8192)])
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dgrad"])
def test_partial_sums_take_little_memory(op: str, mnk: tuple[int, int, int]) -> None:
    _, n, k = mnk
    assert Device(Limits(132, 228 * 1024)).workspace_bytes(op, mnk) <= max(25 << 20, n * k // 8)


def test_tiles_of_one_unit_need_no_room_for_partial_sums() -> None:
    """Though 264 CTAs are no divisor of 384 tiles: none is split."""
    assert Device(Limits(132, 228 * 1024)).workspace_bytes("linear_4bit", (8, 49152, 576)) == 0


def test_a_cta_with_two_unfinished_tiles() -> None:
    """Its first and its last: each has a place of its own for the partial sum, which others read when it is done."""
    check_exact(replace(KIND, mnk=(1, 192, 5 * 1024)), Device(Limits(3, 100 * 1024), block_order="reverse"))
