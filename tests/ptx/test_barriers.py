"""Barriers of a part of the block: named, counted, arrived at without waiting; and their reductions."""

from __future__ import annotations

import numpy as np
import pytest

from . import PTXError, launch, launch_all_schedules
from .kernel_sources import compile_kernels, constant

X = np.random.default_rng(0).integers(0, 100, 256).astype(np.int32)


def produce_and_consume(rounds: int = 4, **macros: str) -> np.ndarray:
    out = np.zeros((rounds, 32), np.int32)
    ptx = compile_kernels("barriers", flags=[f"-D{name}={value}" for name, value in macros.items()])
    launch_all_schedules(ptx, "produce_and_consume", 1, 64, lambda: [constant(X), out, rounds], [1])
    return out


def test_producer_and_consumer() -> None:
    assert np.array_equal(produce_and_consume(), X[:128].reshape(4, 32)[:, ::-1])


def test_missing_full_barrier_is_a_race() -> None:
    with pytest.raises(PTXError, match="race-RAW"):
        produce_and_consume(rounds=1, FULL_SYNC="", FULL_ARRIVE="")


def test_missing_empty_barrier_is_a_race() -> None:
    """The consumer has met the producer, but may still read when the producer writes again."""
    with pytest.raises(PTXError, match=r"race-(WAR|RAW)"):
        produce_and_consume(rounds=2, EMPTY_SYNC="", FULL_ARRIVE='asm volatile("bar.sync 1, 64;" ::: "memory")')


def test_producer_that_runs_ahead() -> None:
    """It arrives twice where the count has room for it once."""
    with pytest.raises(PTXError, match="more warps at barrier 1 than its count of 64"):
        produce_and_consume(rounds=2, EMPTY_SYNC="")


def test_one_sided_barrier_deadlocks() -> None:
    with pytest.raises(PTXError, match=r"DEADLOCK.*bar.sync 1, 64"):
        produce_and_consume(FULL_ARRIVE="")


def test_named_barrier_orders_its_warps_only() -> None:
    """A warp that reads within its pair is safe; one that reads the other pair's half is not, though every thread met
    a barrier.
    """
    out, ptx = np.zeros(128, np.int32), compile_kernels("barriers")
    launch_all_schedules(ptx, "pairs", 1, 128, lambda: [constant(X), out, 63], [1])
    assert np.array_equal(out, X[np.arange(128) ^ 63])
    with pytest.raises(PTXError, match="race-RAW"):
        launch(ptx, "pairs", 1, 128, [constant(X), out, 64])


@pytest.mark.parametrize("first", [2, 7], ids=["even", "seven"])
def test_reductions(first: int) -> None:
    x, out = X.copy(), np.zeros(256, np.int32)
    x[x == 7] = 8
    x[200] = first
    launch_all_schedules(compile_kernels("barriers"), "reductions", 1, 256, lambda: [constant(x), out], [1])
    assert (out == (x & 1).sum() + 1000 * (first == 7) + 2000).all()
    x[3] = -1
    launch(compile_kernels("barriers"), "reductions", 1, 256, [constant(x), out])
    assert (out == (x & 1).sum() + 1000 * (first == 7)).all()


def test_several_blocks_meet_apart() -> None:
    x, out = X[:64].copy(), np.zeros(64, np.int32)
    launch_all_schedules(compile_kernels("barriers"), "reductions", 3, 64, lambda: [constant(x), out], [1])
    assert (out % 1000 == (x & 1).sum()).all()


def test_counts_must_make_sense() -> None:
    ptx, out = compile_kernels("barriers"), np.zeros(96, np.int32)
    launch(ptx, "counted", 1, 64, [out, 64])
    with pytest.raises(PTXError, match="not a multiple of 32"):
        launch(ptx, "counted", 1, 64, [out, 48])
    with pytest.raises(PTXError, match="disagree on the count"):
        launch(ptx, "counts_disagree", 1, 64, [out])
    with pytest.raises(PTXError, match="more warps at barrier 1 than its count of 64"):
        launch(ptx, "counted", 1, 96, [out, 64])
    with pytest.raises(PTXError, match="DEADLOCK"):
        launch(ptx, "counted", 1, 64, [out, 96])


def test_arriving_is_not_waiting() -> None:
    with pytest.raises(PTXError, match="race-RAW x32"):
        launch(compile_kernels("barriers"), "arriving_is_not_waiting", 1, 96, [np.zeros(32, np.int32)])


@pytest.mark.parametrize("schedule", ["lockstep", "warp"])
def test_warp_arrives_with_its_last_lane(schedule: str) -> None:
    """With spin=1 the odd lanes step aside while the even ones of their warp already wait."""
    out = np.zeros(64, np.int32)
    args = [constant(X), out, 20]
    result = launch(compile_kernels("barriers"), "late_lanes", 1, 64, args, schedule=schedule, spin=1)
    assert not result.findings
    assert np.array_equal(out, np.arange(64) % 2 * X[:20].sum())
