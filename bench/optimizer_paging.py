"""The slowdown curve: a step of PagedAdamW against the share of its states that the memory budget holds.

On the CPU the budget is `host_budget`, and the rest of the states is in a file. On a GPU it is `device_budget`, and the
rest is in pinned host memory, or, with none of that, in a file. Of a budget that does not hold all, a few pages are
what the others stream through. In the same run and in turn with the steps, the bytes that each of them moves are moved
by themselves, by one thread. A step is compared with the larger of that and its compute, which is the step with all
states there. Where two threads compute and move the pages, a step takes about that compute and half of those moves.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optimizer_parameters import finished, make_parameters
from optimizer_providers import OURS, SAME
from raw_transfers import RawFile, RawLink, filesystem
from timing import interleaved, percentiles
from torch import Tensor
from torch.nn import Parameter

from qlora_ext import PagedAdamW

Row = dict[str, Any]
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
DTYPE = torch.float32
CHECKED_STEPS = 3
TABLE_BYTES = 2**16  # of memory for what the optimizer knows of its pages


@dataclass
class Point:
    """An optimizer whose budget holds a share of its states, while the others are in `tier`."""

    share: float
    tier: str
    optimizer: PagedAdamW
    steps: int = 0

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1

    def moved(self) -> tuple[int, int, int, float]:
        """(steps, bytes read, bytes written, seconds waited) since the start."""
        stats = self.optimizer.stats()
        return self.steps, stats["bytes_read"][self.tier], stats["bytes_written"][self.tier], stats["seconds_waited"]


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[Row], bool]:
    """A row for each point of each curve, and whether a curve failed; page files are made in the folder."""
    rows: list[Row] = []
    failed = False
    for bits in (32, 8):
        for tier in ("host", "file") if args.device.type == "cuda" else ("file",):
            same: Row = {"bench": "optimizer_paging", "device": args.device.type, "bits": bits, "tier": tier}
            same |= {"provider": f"{OURS} PagedAdamW, {bits}-bit", "dtype": str(DTYPE)[6:], "elements": args.elements}
            same |= {"huge_pages": args.huge_pages, "filesystem": filesystem(folder) if tier == "file" else None}
            print(f"paging, {bits}-bit, {tier}", file=sys.stderr)
            try:
                rows += curve(same, args, folder)
            except Exception as reason:
                failed = True
                rows.append(same | {"skipped": f"{type(reason).__name__}: {reason}"})
                print(f"FAILED: {rows[-1]}\n{traceback.format_exc()}", file=sys.stderr)
    return rows, failed


def curve(same: Row, args: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows of one width of states and one tier for those that the budget does not hold."""
    params = make_parameters([args.elements], DTYPE, args.device)
    settings: dict[str, Any] = SAME | {"state_bits": same["bits"]}
    settings |= {"page_bytes": args.page_bytes} if args.page_bytes else {}
    untouched = PagedAdamW(params, **settings).stats()  # pages that no step has written take no memory
    pages, page_bytes = untouched["unwritten_pages"], untouched["page_bytes"]
    same |= {"page_bytes": page_bytes, "state_bytes": pages * page_bytes}

    points, rows = [], []
    start = [p.detach().clone() for p in params]
    end: list[Tensor] = []
    for share in SHARES:
        budget = round(share * pages) * page_bytes
        before = anonymous_bytes()
        point = Point(share, same["tier"], make(params, settings, budget, same, folder / f"{share:.0%}"))
        take_steps(point, params, start)
        grown = anonymous_bytes() - before
        row = same | {"share": share, "budget_bytes": budget, "checked_steps": CHECKED_STEPS}
        row |= {name: point.optimizer.stats()[name] for name in ("pages", "ring_pages")}
        if args.device.type == "cpu":
            row |= {"rss_anon_growth_bytes": grown, "rss_anon_bound_bytes": budget + 2 * page_bytes}
            assert grown <= row["rss_anon_bound_bytes"] + TABLE_BYTES, f"at {share:.0%} memory grew too much: {row}"
        end = end or [p.detach().clone() for p in params]
        assert all(map(torch.equal, params, end)), f"the parameters at {share:.0%} are not those at {SHARES[0]:.0%}"
        points.append(point)
        rows.append(row)

    if same["tier"] == "file":
        raw: RawFile | RawLink = RawFile(folder / "raw", page_bytes, pages)
    else:
        raw = RawLink(page_bytes, args.device)
    streamed = {row["share"]: row["pages"][row["tier"]] for row in rows}
    moves = {share: partial(raw.move, count) for share, count in streamed.items() if count}
    return [row | timed for row, timed in zip(rows, time_points(points, moves, args), strict=True)]


def make(params: list[Parameter], settings: Row, budget: int, same: Row, file: Path) -> PagedAdamW:
    """An optimizer with this budget in the memory that it computes in, and the rest of its states in the tier."""
    if same["device"] == "cpu":
        return PagedAdamW(params, **settings, host_budget=budget, page_file=file)
    below: Row = {"host_budget": 0, "page_file": file} if same["tier"] == "file" else {}
    return PagedAdamW(params, **settings, device_budget=budget, **below)


@torch.no_grad()
def take_steps(point: Point, params: list[Parameter], start: list[Tensor]) -> None:
    for p, value in zip(params, start, strict=True):
        p.copy_(value)
    for _ in range(CHECKED_STEPS):
        point.step()


def time_points(points: list[Point], moves: dict[float, Callable[[], None]], args: argparse.Namespace) -> list[Row]:
    """What steps take, in turn with the moves alone, each of what the steps of one share move."""
    calls = {("step", point.share): finished(point.step, args.device) for point in points}
    calls |= {("move", share): move for share, move in moves.items()}
    before = [point.moved() for point in points]
    spent = interleaved(calls, seconds=args.seconds, burst=args.burst, warmup=args.burst)
    times = {call: percentiles(seconds) for call, seconds in spent.items()}
    compute_s = times["step", SHARES[0]]["p50"]
    rows = []
    for point, first in zip(points, before, strict=True):
        steps, read, written, waited = (now - then for now, then in zip(point.moved(), first, strict=True))
        row: Row = {"read_bytes": read // steps, "written_bytes": written // steps, "waited_s": waited / steps}
        row |= times["step", point.share]
        raw_s = times["move", point.share]["p50"] if point.share in moves else 0.0
        row |= {"compute_s": compute_s, "raw_s": raw_s, "over_resident": row["p50"] / compute_s}
        row |= {"over_larger": row["p50"] / max(raw_s, compute_s), "over_sum": row["p50"] / (raw_s + compute_s)}
        rows.append(row)
    return rows


def anonymous_bytes() -> int:
    """Of this process's memory: without what it has mapped of files."""
    [kib] = re.findall(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) * 1024
