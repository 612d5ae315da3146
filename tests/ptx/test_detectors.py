"""One planted bug for each thing that is watched, and the same detector quiet on the right code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from . import Gpu, PTXError, Result, launch, launch_all_schedules
from .kernel_sources import bfloat16, compile_kernels, constant

X = constant(np.random.default_rng(0).standard_normal(512).astype(np.float32))
NUMBERS = constant(np.arange(64, dtype=np.int32))


def zeros(count: int = 128, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(count, dtype)


def run(name: str, grid: int, block: int, args: Sequence[Any], **options: Any) -> Result:
    return launch(compile_kernels("planted_bugs"), name, grid, block, args, max_steps=100_000, **options)


# kernel, grid, block, arguments, what it must say
RAISED: list[tuple[str, int, int, Callable[[], list[Any]], str]] = [
    (
        "store_out_of_bounds",
        1,
        128,
        lambda: [zeros(100), 100],
        r"OUT OF BOUNDS global store of 4 bytes .*offset 400\) .*thread\(100",
    ),
    (
        "load_out_of_bounds",
        1,
        128,
        lambda: [constant(zeros(100)), zeros(), 100],
        r"OUT OF BOUNDS global load of 4 bytes",
    ),
    (
        "vector_out_of_bounds",
        1,
        9,
        lambda: [zeros(34), zeros(9)],
        r"OUT OF BOUNDS global load of 16 bytes",
    ),
    ("store_to_const", 1, 32, lambda: [constant(zeros(32))], "STORE TO READ-ONLY"),
    ("misaligned", 1, 8, lambda: [X, zeros()], r"MISALIGNED global load of 16 bytes .*offset 4\)"),
    ("shared_out_of_bounds", 1, 64, lambda: [zeros()], r"OUT OF BOUNDS shared store of 4 bytes at offset 256 of 256"),
    (
        "local_out_of_bounds",
        1,
        32,
        lambda: [zeros(32, np.int32), 4],
        "OUT OF BOUNDS local store of 4 bytes at offset 16",
    ),
    ("missing_syncthreads", 1, 128, lambda: [X, zeros()], "ERROR race-RAW x128"),
    ("missing_syncwarp", 1, 32, lambda: [X, zeros()], "ERROR race-RAW-intrawarp x32"),
    ("overwritten_too_early", 1, 128, lambda: [X, zeros()], "ERROR race-WAR x"),
    ("broadcast_then_overwritten", 1, 32, lambda: [zeros(32)], "ERROR race-WAR-intrawarp x1"),
    ("atomic_then_plain", 1, 64, lambda: [zeros(64, np.uint32)], "ERROR race-RAW x"),
    ("missing_wait", 1, 32, lambda: [X, zeros()], "ERROR race-read-of-unfinished-cp.async"),
    ("missing_barrier_after_wait", 1, 64, lambda: [X, zeros()], "ERROR race-RAW x64"),
    ("divergent_shuffle", 1, 32, lambda: [NUMBERS, zeros(64, np.int32)], "ERROR shfl-inactive x16"),
    ("wrong_shuffle_mask", 1, 32, lambda: [NUMBERS, zeros(64, np.int32)], "ERROR shfl-inactive x16"),
    ("lane_outside_its_mask", 1, 32, lambda: [zeros(32, np.int32)], "ERROR mask-lacks-caller x16"),
    ("lanes_that_never_come", 1, 32, lambda: [zeros(32, np.int32)], "WARP SYNC DEADLOCK"),
    ("divergent_barrier", 1, 64, lambda: [NUMBERS, zeros(64, np.int32)], "ERROR divergent-barrier x4"),
    ("half_a_warp_at_the_barrier", 1, 64, lambda: [zeros()], "ERROR divergent-barrier x2"),
    ("deadlock", 1, 32, lambda: [zeros()], "BARRIER DEADLOCK: 32 threads"),
    ("endless", 1, 32, lambda: [zeros(4, np.int32)], "step limit 100000 exceeded"),
    ("colliding_threads", 1, 32, lambda: [X, zeros()], "ERROR store-collision x24"),
    ("colliding_blocks", 4, 32, lambda: [X, zeros()], "ERROR store-collision x96"),
    ("store_not_fenced", 2, 32, lambda: [zeros(3), zeros(1, np.uint32)], "ERROR unfenced-global-read"),
    ("nc_of_written", 1, 32, lambda: [zeros(32)], "ERROR ld.nc-of-written-data"),
    ("trapped", 1, 64, lambda: [NUMBERS], r"trap executed by block\(0,0,0\) thread\(63,0,0\)"),
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "grid", "block", "make_args", "message"), RAISED, ids=[bug[0] for bug in RAISED])
def test_planted_bug_is_found(
    name: str, grid: int, block: int, make_args: Callable[[], list[Any]], message: str, arch: str
) -> None:
    with pytest.raises(PTXError, match=message):
        launch(compile_kernels("planted_bugs", arch), name, grid, block, make_args(), max_steps=100_000)


@pytest.mark.parametrize(
    "options", [{"schedule": "warp"}, {"schedule": "warp_rev"}, {"schedule": "warp_rand"}], ids=str
)
@pytest.mark.parametrize("name", ["missing_syncthreads", "overwritten_too_early", "missing_barrier_after_wait"])
def test_races_show_under_every_schedule(name: str, options: dict[str, str]) -> None:
    block = 64 if name == "missing_barrier_after_wait" else 128
    with pytest.raises(PTXError, match="ERROR race-"):
        run(name, 1, block, [X, zeros()], **options)


def test_blocks_one_after_the_other_collide_too() -> None:
    with pytest.raises(PTXError, match="ERROR global-conflicting-stores x32"):
        run("colliding_blocks", 2, 32, [X, zeros()], block_order="serial")
    with pytest.raises(PTXError, match="ERROR global-conflicting-stores x1"):
        run("blocks_disagree", 2, 1, [zeros(1)], block_order="reverse")


@pytest.mark.parametrize(
    ("name", "args", "count"), [("uninitialised_shared", [zeros()], 4), ("counter_never_zeroed", [], 64)]
)
def test_unwritten_memory_is_noted(name: str, args: list[Any], count: int) -> None:
    """A note, not an error: padded tiles read it legitimately. Shared memory is filled with NaN, so a result that
    uses it shows it.
    """
    gpu = Gpu()
    result = run(name, 1, 64, args or [gpu.empty(1, np.uint32)], dev=gpu)
    assert result.categories == {"uninit-read"}
    assert result.findings[0].count == count
    if args:
        assert np.isnan(args[0][:4]).all()
        assert (args[0][4:64] == 1).all()


def test_every_element_of_a_vector_must_be_written() -> None:
    gpu = Gpu()
    x, out = gpu.empty(36, np.float32), np.zeros(9, np.float32)
    gpu.write(x.address, np.ones(34, np.float32).tobytes())
    [finding] = run("vector_out_of_bounds", 1, 9, [x, out], dev=gpu).findings
    assert (finding.category, finding.count) == ("uninit-read", 1)


def test_written_elements_are_known() -> None:
    gpu = Gpu()
    out = gpu.empty(128, np.float32)
    run("uninitialised_shared", 1, 64, [out], dev=gpu)
    assert out.written_elements().tolist() == [True] * 64 + [False] * 64


@pytest.mark.parametrize("fence", ["__threadfence()", 'asm volatile("fence.acq_rel.gpu;")'])
def test_fence_of_the_last_block(fence: str) -> None:
    x = np.ones(600, np.float32)

    def last_block(fence: str) -> None:
        args = [constant(x), zeros(6), zeros(1), zeros(1, np.uint32), zeros(1), 600]
        launch(compile_kernels("reduce", flags=[f"-DFENCE={fence}"]), "reduce_last", 6, 128, args, dynamic_smem=512)
        assert args[2][0] == 600

    last_block(fence)
    for missing in ("", "__threadfence_block()"):
        with pytest.raises(PTXError, match="ERROR unfenced-global-read"):
            last_block(missing)


@pytest.mark.parametrize("options", [{}, {"schedule": "warp"}, {"schedule": "warp_rev"}], ids=str)
def test_gemm_without_its_last_barrier(options: dict[str, str]) -> None:
    """The results are right in every lazy schedule, so only the race detector sees it; numbers alone need the eager
    copy.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 128)).astype(bfloat16), rng.standard_normal((32, 128)).astype(bfloat16)
    exact = a.astype(float) @ b.astype(float).T
    ptx = compile_kernels("gemm", flags=("-DWITHOUT_LAST_BARRIER",))

    def error(**more: Any) -> tuple[float, set[str]]:
        c, c32 = np.zeros((16, 32), bfloat16), np.zeros((16, 32), np.float32)
        args = [constant(a), constant(b), c, c32, 16, 32, 128]
        result = launch(ptx, "gemm16", 1, 128, args, strict=False, **options, **more)
        return float(np.abs(c32 - exact).max()), result.categories

    difference, categories = error()
    assert difference < 1e-5
    expected = {"race-WAR"} | ({"race-RAW", "race-read-of-unfinished-cp.async"} if options else set())
    assert expected <= categories
    assert error(race=False) == (difference, set())
    assert (error(race=False, cp_async="eager")[0] > 1) == bool(options)


@pytest.mark.parametrize(
    ("name", "grid", "block", "make_args"),
    [
        ("order_of_warps", 1, 128, lambda: [zeros(128, np.int32)]),
        ("order_of_blocks", 8, 32, lambda: [zeros(8, np.int32), zeros(1, np.int32)]),
        ("race_on_global", 1, 128, lambda: [zeros(256, np.int32)]),
    ],
)
def test_dependence_on_the_schedule(name: str, grid: int, block: int, make_args: Callable[[], list[Any]]) -> None:
    run(name, grid, block, make_args())  # no single run shows it
    with pytest.raises(PTXError, match=r"arguments \[0\] depend on the schedule"):
        launch_all_schedules(compile_kernels("planted_bugs"), name, grid, block, make_args, [0])
