"""Timing on a shared, noisy machine: providers run interleaved, and medians and their ratios are what counts."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
LEAST_CALLS = 5  # of fewer, a neighbour who is busy for a moment changes the median


def interleaved(
    providers: dict[Key, Callable[[], object]], *, seconds: float, burst: float = 0.05, warmup: float = 0.05
) -> dict[Key, list[float]]:
    """Time each provider in turn, in bursts, until every one has had `seconds`, and LEAST_CALLS.

    Each round is in another order: who always came after the same one would find memory always as that left it.

    Args:
        providers: what to call, by name.
        seconds: of measuring for each provider.
        burst: seconds that one provider runs before the next has its turn; at least one call.
        warmup: seconds of uncounted calls of each, first; at least one call.

    Returns:
        Seconds of each call, by name. The first call of a burst finds the cache as the provider before left it, and
        is counted only if it fills the burst alone.
    """
    for call in providers.values():
        _burst(call, warmup)
    times: dict[Key, list[float]] = {name: [] for name in providers}
    spent = dict.fromkeys(providers, 0.0)
    order = random.Random(0)
    while waiting := [name for name in providers if spent[name] < seconds or len(times[name]) < LEAST_CALLS]:
        order.shuffle(waiting)
        for name in waiting:
            calls = _burst(providers[name], burst)
            spent[name] += sum(calls)
            times[name] += calls[1:] or calls
    return times


def _burst(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of the calls that fill so much time."""
    times = []
    start = time.perf_counter()
    burst_end = start + seconds
    while True:
        call()
        end = time.perf_counter()
        times.append(end - start)
        if end >= burst_end:
            return times
        start = end


def cold_bytes(cache_bytes: int, room: int, providers: int) -> int:
    """So much must be used in rotation, by each provider, to find nothing of it in the cache: 4 times its size.

    Less where all providers' would take more bytes than there is room for, as with the caches of some servers.
    """
    return min(4 * cache_bytes, room // providers)


def fits_hot(size: int, cache_bytes: int) -> bool:
    """Whether so many bytes stay in the cache from call to call: half of it is left to whatever else a call touches."""
    return size <= cache_bytes // 2


def rotated(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call that is each of these in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def percentiles(times: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in seconds, and the number of calls."""
    ordered = sorted(times)
    return {
        "p20": ordered[round(0.2 * (len(ordered) - 1))],
        "p50": statistics.median(ordered),
        "p80": ordered[round(0.8 * (len(ordered) - 1))],
        "calls": len(ordered),
    }
