"""Timing on a shared, noisy machine: providers run interleaved, and medians and their ratios are what counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(
    providers: dict[str, Callable[[], object]], *, seconds: float, burst: float = 0.05, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each provider in turn, in bursts, until every one has had its share of `seconds`.

    Args:
        providers: what to call, by name.
        seconds: of measuring for each provider.
        burst: seconds that one provider runs before the next has its turn; at least one call.
        warmup: uncounted calls of each, first.

    Returns:
        Seconds of each call, by name.
    """
    for call in providers.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in providers}
    while any(sum(spent) < seconds for spent in times.values()):
        for name, call in providers.items():
            burst_end = time.perf_counter() + burst
            while True:
                start = time.perf_counter()
                call()
                end = time.perf_counter()
                times[name].append(end - start)
                if end >= burst_end:
                    break
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in seconds, and the number of calls."""
    ordered = sorted(times)
    return {
        "p20": ordered[round(0.2 * (len(ordered) - 1))],
        "p50": statistics.median(ordered),
        "p80": ordered[round(0.8 * (len(ordered) - 1))],
        "calls": len(ordered),
    }
