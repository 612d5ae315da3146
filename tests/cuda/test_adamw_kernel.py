"""The bytes of adamw's kernel: those of the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import torch
from cases import DTYPES, normal
from launcher import AdamwSlice, Device, under_schedules
from torch import Tensor

from qlora_ext import _C

TYPES = list(DTYPES.values())
NUMBERS = (1e-3, 0.9, 0.999, 1e-8, 0.01)
NAMES = ("lr", "beta1", "beta2", "eps", "weight_decay")


def slice_of(
    n: int,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype = torch.float32,
    *,
    is_8bit: bool = False,
    numbers: tuple[float, float, float, float, float] = NUMBERS,
    step: int = 3,
    index: int = 0,
) -> AdamwSlice:
    """Of n elements, in the midst of a training; some of the states and gradients are 0."""
    param, grad = normal(n).to(dtype), (normal(n) * 0.01).to(grad_dtype)
    grad[::7] = 0
    if is_8bit:
        blocks = -(-n // 256)
        codes = [torch.randint(256, (n,), dtype=torch.uint8) for _ in range(2)]
        states = [*codes, torch.rand(blocks) * 0.01, torch.rand(blocks) * 1e-4]
    else:
        states = [normal(n) * 0.01, normal(n).square() * 1e-4, None, None]
    return AdamwSlice(param, grad, *states, numbers, step, index=index)


def on_cpu(slices: Iterable[AdamwSlice], **options: object) -> list[tuple[Tensor | None, ...]]:
    """What Device.adamw returns, by the CPU's kernel."""
    return [_one_on_cpu(one, **options) for one in slices]


def _one_on_cpu(one: AdamwSlice, **options: object) -> tuple[Tensor | None, ...]:
    is_8bit = one.exp_avg_absmax is not None
    ours = [None if t is None else t.clone() for t in (one.param, *one[2:6])]
    nothing = torch.zeros(0), torch.zeros(0, dtype=one.exp_avg.dtype), torch.zeros(0, dtype=one.exp_avg.dtype)
    nothing += (torch.zeros(0), torch.zeros(0))
    # A parameter's index is its place in the list.
    param, exp_avg, exp_avg_sq, *absmax = ([empty] * one.index + [t] for empty, t in zip(nothing, ours, strict=True))
    _C.adamw_step(
        param,
        [torch.zeros(0)] * one.index + [one.grad],
        exp_avg,
        exp_avg_sq,
        *(absmax if is_8bit else ([], [])),
        **dict(zip(NAMES, one.numbers, strict=True)),
        step=one.step,
        maximize=one.maximize,
        **options,
    )
    return tuple(ours)


def assert_same(got: list[tuple[Tensor | None, ...]], expected: list[tuple[Tensor | None, ...]]) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        for name, x, y in zip(("param", "exp_avg", "exp_avg_sq", "absmax", "absmax"), a, b, strict=True):
            if x is None or y is None:
                assert x is y
                continue
            different = int((x.view(-1).view(torch.uint8) != y.view(-1).view(torch.uint8)).sum())
            assert different == 0, f"{different} bytes of {name} of slice {i}"


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), list(product(TYPES, TYPES)))
def test_bytes_equal_cpu(dtype: torch.dtype, grad_dtype: torch.dtype, is_8bit: bool) -> None:
    slices = [slice_of(n, dtype, grad_dtype, is_8bit=is_8bit) for n in (256, 515)]
    assert_same(Device().adamw(slices), on_cpu(slices))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 127, 128, 129, 255, 257, 2048, 2049])
def test_every_tail(n: int) -> None:
    """Of 2048 elements and more there is more than one CTA."""
    slices = [slice_of(n), slice_of(n, is_8bit=True)]
    assert_same(Device().adamw(slices), on_cpu(slices))


def test_many_slices_in_one_launch() -> None:
    """Of all dtypes, states and hypers, empty ones between them."""
    sizes = [0, 300, 0, 0, 1, 256, 4096, 5, 0, 700, 0]
    slices = [
        slice_of(n, TYPES[i % 3], TYPES[i % 2], is_8bit=i % 2 == 1, numbers=(1e-3 * (i + 1), *NUMBERS[1:]), step=i + 1)
        for i, n in enumerate(sizes)
    ]
    device = Device()
    assert_same(device.adamw(slices), on_cpu(slices))
    assert len(device.results) == 1


def test_nothing_to_do_launches_nothing() -> None:
    device = Device()
    assert_same(device.adamw([]), [])
    device.adamw([slice_of(0)])
    assert not device.results


@pytest.mark.parametrize(
    "numbers",
    [
        (1e-3, 0.0, 0.999, 1e-8, 0.0),
        (1e-3, 0.3, 0.0, 1e-8, 0.1),
        (0.0, 0.9, 0.95, 1e-8, 0.5),
        (-1.0, 0.5, 0.9, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_hypers(numbers: tuple[float, float, float, float, float], maximize: bool) -> None:
    one = slice_of(300, numbers=numbers)._replace(maximize=maximize)
    assert_same(Device().adamw([one]), on_cpu([one]))


@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_gradients_are_unscaled(scale: float) -> None:
    slices = [slice_of(300), slice_of(300, grad_dtype=torch.float16, is_8bit=True)]
    grad_scale = torch.tensor(scale)
    assert_same(Device().adamw(slices, grad_scale), on_cpu(slices, grad_scale=grad_scale))


@pytest.mark.parametrize(("found_inf", "skipped"), [(0.0, False), (1.0, True)])
def test_found_inf_leaves_everything(found_inf: float, skipped: bool) -> None:
    slices = [slice_of(300), slice_of(300, is_8bit=True)]
    flag = torch.tensor(found_inf)
    device = Device()
    got = device.adamw(slices, found_inf=flag)
    assert_same(got, on_cpu(slices, found_inf=flag))
    assert skipped == all(torch.equal(after[0], before.param) for after, before in zip(got, slices, strict=True))
    if skipped:
        assert not any(traffic.written.times.any() for traffic in device.results[0].traffic.values())


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
def test_stochastic_rounding(is_8bit: bool) -> None:
    slices = [slice_of(515, torch.bfloat16, is_8bit=is_8bit, index=i) for i in range(2)]
    assert_same(Device().adamw(slices, seed=7), on_cpu(slices, seed=7))


def test_slices_of_a_parameter_are_the_parameter() -> None:
    """Also their random bits."""
    whole = slice_of(1300, torch.bfloat16, is_8bit=True)
    parts = []
    for begin, end in [(0, 512), (512, 768), (768, 1300)]:
        blocks = slice(begin // 256, -(-end // 256))
        tensors = [tensor[begin:end] for tensor in whole[:4]] + [absmax[blocks] for absmax in whole[4:6]]
        parts.append(AdamwSlice(*tensors, *whole[6:])._replace(first=begin))
    [expected] = on_cpu([whole], seed=3)
    got = Device().adamw(parts, seed=3)
    assert_same([tuple(torch.cat(column) for column in zip(*got, strict=True))], [expected])


@pytest.mark.parametrize("name", ["param0", "grad0", "exp_avg0", "exp_avg_sq0"])
@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
def test_unaligned(name: str, is_8bit: bool) -> None:
    """Then no group is read or written at once."""
    one = slice_of(300, torch.bfloat16, torch.float16, is_8bit=is_8bit)
    offset = 1 if is_8bit and "exp" in name else 4 if "exp" in name else 2
    assert_same(Device(offsets={name: offset}).adamw([one]), on_cpu([one]))


def test_blocks_of_zeros_and_subnormals() -> None:
    """The reciprocal of their absmax would be infinite and is cut to the largest float."""
    one = slice_of(768, is_8bit=True)
    one.grad[:256], one.grad[256:512] = 0, 1e-21
    one.exp_avg[:], one.exp_avg_sq[:] = 127, 0
    assert_same(Device().adamw([one]), on_cpu([one]))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_bad_gradients_spoil_what_they_do_on_the_cpu(bad: float) -> None:
    """They are kept out by found_inf; without it a NaN has its place, and in 8 bits its block."""
    slices = [slice_of(515), slice_of(515, is_8bit=True)]
    for one in slices:
        one.grad[300] = bad
    for got, expected in zip(Device().adamw(slices), on_cpu(slices), strict=True):
        for x, y in zip(got, expected, strict=True):
            if x is not None and y is not None:
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_every_schedule_gives_the_same_bytes() -> None:
    one = slice_of(2100, torch.bfloat16, is_8bit=True)

    def run(device: Device) -> tuple[Tensor, ...]:
        [outputs] = device.adamw([one], seed=1)
        return tuple(output for output in outputs if output is not None)

    assert_same([under_schedules(run)], on_cpu([one], seed=1))


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_traffic(dtype: torch.dtype, is_8bit: bool) -> None:
    """Everything is read once and written once, in whole sectors."""
    device = Device()
    device.adamw([slice_of(4096, dtype, dtype, is_8bit=is_8bit)])
    [result] = device.results
    for name in ("param0", "grad0", "exp_avg0", "exp_avg_sq0"):
        read = result.traffic[name].read
        assert (read.times == 1).all(), name
        assert read.sectors == read.compulsory_sectors, name
        if name != "grad0":
            written = result.traffic[name].written
            assert (written.times == 1).all(), name
            assert written.sectors == written.compulsory_sectors, name
