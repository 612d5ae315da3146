"""Arguments, limits and options of a launch."""

from __future__ import annotations

import numpy as np
import pytest

from . import Gpu, PTXError, launch, launch_all_schedules
from .kernel_sources import bfloat16, compile_kernels, constant


@pytest.fixture
def ptx() -> str:
    return compile_kernels("launch", flags=("-w",))


def test_arguments_of_every_kind(ptx: str) -> None:
    out = np.zeros(8, np.int64)
    pair = np.zeros((), np.dtype([("a", "i2"), ("b", "i8")], align=True))
    pair["a"], pair["b"] = -3, 2**40
    half = np.asarray(1.5, bfloat16)[()]
    launch(ptx, "arguments", 1, 1, [out, pair[()], 1.25, 0.5, True, np.uint8(200), None, half])
    assert out.tolist() == [-3, 2**40, 5, 4, 1, 200, 1, 0x3FC0]
    launch(ptx, "arguments", 1, 1, [out, pair[()].tobytes(), np.float32(2), 1, 0, 300, 0, 5])
    assert out.tolist() == [-3, 2**40, 8, 8, 0, 300 - 256, 1, 5]


def test_wrong_arguments_raise(ptx: str) -> None:
    out = np.zeros(4, np.int32)
    with pytest.raises(TypeError, match="expected 1 arguments, got 2"):
        launch(ptx, "bounded", 1, 1, [out, 1])
    with pytest.raises(TypeError, match="C-contiguous"):
        launch(ptx, "bounded", 1, 1, [out[::2]])
    with pytest.raises(TypeError, match="C-contiguous array for a pointer expected, parameter u32"):
        launch(ptx, "follow", 1, 1, [out, out])
    with pytest.raises(TypeError, match=r"expected u32, got the float 1\.5"):
        launch(ptx, "follow", 1, 1, [out, 1.5])
    with pytest.raises(TypeError, match="expected 4 bytes, got 2"):
        launch(ptx, "follow", 1, 1, [out, b"ab"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        launch(ptx, "bounded", 1, 1, [out], colour=1)
    with pytest.raises(ValueError, match="schedule: expected one of lockstep, warp, warp_rev, warp_rand, got 'fast'"):
        launch(ptx, "bounded", 1, 1, [out], schedule="fast")


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [(1, 65, "takes 1 to 64"), (1, 0, "block of 0"), ((1, 70000), 1, "lengths must be"), (0, 1, "lengths must be")],
)
def test_limits_of_a_launch(ptx: str, grid: object, block: int, message: str) -> None:
    with pytest.raises(PTXError, match=message):
        launch(ptx, "bounded", grid, block, [np.zeros(70, np.int32)])


def test_shared_memory_has_a_size(ptx: str) -> None:
    out = np.zeros(64, np.float32)
    assert launch(ptx, "dynamic", 1, 64, [out], dynamic_smem=256).statistics.shared_bytes == 256
    with pytest.raises(PTXError, match="at offset 252 of 252"):
        launch(ptx, "dynamic", 1, 64, [out], dynamic_smem=252)
    with pytest.raises(PTXError, match="the most is 232448"):
        launch(ptx, "dynamic", 1, 64, [out], dynamic_smem=232449)


@pytest.mark.parametrize("max_lanes", [64, 1 << 16], ids=["waves", "together"])
def test_three_dimensions(ptx: str, max_lanes: int) -> None:
    out = np.zeros((24, 30), np.int32)
    results = launch_all_schedules(ptx, "places", (2, 3, 4), (5, 3, 2), lambda: [out], [0], max_lanes=max_lanes)
    assert np.array_equal(out, np.arange(24)[:, None] * 1000 + np.arange(30))
    assert {result.statistics.threads for result in results} == {24 * 30}


def test_the_same_array_twice_is_the_same_memory() -> None:
    x = np.ones(64, np.float32)
    launch(compile_kernels("vector_add"), "vecadd", 1, 64, [x, x, x, 64, 2.0])
    assert (x == 3).all()


def test_tables_of_pointers(ptx: str) -> None:
    gpu = Gpu()
    numbers = [gpu.array(np.array([10 * i], np.int32), f"number{i}", offset=4 * i) for i in range(3)]
    table = np.array([number.address for number in numbers], np.uint64)
    traffic = launch(ptx, "follow", 1, 1, [constant(table), 3], dev=gpu).traffic
    assert [int(number.get()[0]) for number in numbers] == [0, 11, 22]
    assert traffic["number1"].read.bytes == traffic["number1"].written.bytes == 4


def test_addresses_are_64_bits_wide(ptx: str) -> None:
    """A pointer to the start of an array too large to hold, of which only the end is there."""
    gpu, out, far = Gpu(), np.zeros(1, np.int32), 128 * 4096 * 4096
    end = gpu.array(np.array([1, 2, 3], np.uint8), "end")
    launch(ptx, "wide", 1, 1, [end.address - far, far + 1, out], dev=gpu)
    assert out[0] == 2
    with pytest.raises(PTXError, match=r"OUT OF BOUNDS global load of 1 bytes .*end\[3 bytes\] offset 3"):
        launch(ptx, "wide", 1, 1, [end.address - far, far + 3, out], dev=gpu)


@pytest.mark.parametrize(("where", "expected"), [(0, [0, 6, 0]), (1, [0, 4, 0]), (2, [1, 1, 0])])
def test_generic_addresses(ptx: str, where: int, expected: list[int]) -> None:
    out = np.zeros(3, np.int32)
    launch(ptx, "generic", 1, 1, [out, where])
    assert out.tolist() == expected


def test_generic_addresses_of_several_spaces_at_once(ptx: str) -> None:
    out = np.zeros(3, np.int32)
    launch(ptx, "generic", 1, 2, [out, 3], race=False)  # both threads set s to 5
    assert out.tolist() == [1, 1, 6]


@pytest.mark.parametrize("schedule", ["lockstep", "warp", "warp_rev"])
def test_blocks_that_wait_for_each_other(ptx: str, schedule: str) -> None:
    out, flag = np.zeros(1, np.int32), np.zeros(1, np.int32)
    launch(ptx, "wait_for_another_block", 2, 1, [flag, out], schedule=schedule, spin=10)
    assert out[0] == 7
    flag[0] = 0
    with pytest.raises(PTXError, match="step limit 1000 exceeded"):
        launch(ptx, "wait_for_another_block", 2, 1, [flag, out], block_order="serial", max_steps=1000)


def test_time_is_not_modelled(ptx: str) -> None:
    with pytest.raises(PTXError, match=r"special register %clock64"):
        launch(ptx, "clocks", 1, 1, [np.zeros(1, np.int64)])


def test_watches_can_be_turned_off() -> None:
    x, out = np.ones(512, np.float32), np.zeros(128, np.float32)
    off = dict.fromkeys(("race", "uninit", "sharing", "traffic", "banks"), False)
    result = launch(compile_kernels("planted_bugs"), "missing_syncthreads", 1, 128, [x, out], **off)
    assert not result.findings
    assert not result.traffic
    assert not result.banks
