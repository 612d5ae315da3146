"""Where bench_cuda.py measures: on a GPU with events and CUDA graphs, or, to prove the script itself, on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def seconds(self, call: Callable[[], object], calls: int) -> list[float]:
        """Of each of so many calls in a row; a call before them keeps the launch latency out of the first."""
        call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]

    def graph(self, call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """The call as one CUDA graph, and what its first replay computed."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # what is set up only once must not be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, results

    def free(self) -> None:
        """Give back what the allocator keeps."""
        torch.cuda.empty_cache()


class DryRun:
    """The same on CPU tensors: the clock is the CPU's, and a graph is the call itself."""

    device = torch.device("cpu")
    cache_bytes = 4096

    def seconds(self, call: Callable[[], object], calls: int) -> list[float]:
        ticks = [time.perf_counter()]
        for _ in range(calls):
            call()
            ticks.append(time.perf_counter())
        return [end - start for start, end in pairwise(ticks)]

    def graph(self, call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        return call, call()

    def free(self) -> None:
        pass


def interleaved(
    where: Gpu | DryRun, passes: dict[Key, Callable[[], object]], *, seconds: float
) -> dict[Key, list[float]]:
    """Seconds of each call of each pass, measured in bursts that take turns, so that a change of clock meets all."""
    calls, bursts = {}, 5
    for key, call in passes.items():
        once = statistics.median(where.seconds(call, 3))
        calls[key] = max(1, round(seconds / bursts / once))
    times: dict[Key, list[float]] = {key: [] for key in passes}
    for _ in range(bursts):
        for key, call in passes.items():
            times[key] += where.seconds(call, calls[key])
    return times
