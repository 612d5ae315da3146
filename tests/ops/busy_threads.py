"""Prints how many threads work in each call where torch is told one, and where it is told two: {name: [1, 2]}.

In an environment of GOMP_SPINCOUNT=0: a thread that waits spins else, and takes as much of the CPU as if it worked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from adamw import Ours
from thread_calls import CALLS, WEIGHT

# One of each place where work is cut for threads.
OPS = ("quantize_4bit", "quantize_absmax", "dequantize_4bit", "dropout_mask")
PRODUCTS = ("linear_4bit-M1", "linear_4bit-M128", "linear_4bit_dgrad-M1", "lora_backward")


def ticks_by_thread() -> dict[str, int]:
    """CPU time (user + system) of each native thread of this process so far, in ticks of 10 ms."""
    stats = {task.name: (task / "stat").read_text() for task in Path("/proc/self/task").iterdir()}
    return {thread: sum(map(int, stat.rpartition(")")[2].split()[11:13])) for thread, stat in stats.items()}


def busy_threads(call: Callable[[], object]) -> int:
    """How many threads did at least a quarter of the work of calls that take this one 0.3 s of CPU time."""
    call()
    before = ticks_by_thread()
    end = time.thread_time() + 0.3  # of the clock's time other processes may have most
    while time.thread_time() < end:
        call()
    spent = [ticks - before.get(thread, 0) for thread, ticks in ticks_by_thread().items()]
    return sum(ticks >= 0.25 * sum(spent) for ticks in spent)


def main() -> None:
    calls = {op: partial(CALLS[op], torch.float32) for op in OPS + PRODUCTS}
    calls["adamw_step"] = partial(Ours([WEIGHT]).step, 1, [WEIGHT])
    found: dict[str, list[int]] = {name: [] for name in calls}
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for name, call in calls.items():
            found[name].append(busy_threads(call))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
