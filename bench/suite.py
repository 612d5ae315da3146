"""The skeleton of the CPU benches, one script an op: check each provider's result, then time all, then compare.

Every result is checked before anything is timed; a wrong one of ours is a failure, a wrong one of a peer is a row that
says so, as is a peer that is missing. Two modes: hot (one weight, at most half the last-level cache) and cold (weights
in rotation, 4 times the cache, or what there is memory for). The machine's limits are measured before and after each
shape, in limits.py. A run consists of two processes, with and without huge pages for malloc: they decide what a
temporary costs.
"""

from __future__ import annotations

import copy
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import limits
import options
import record
import torch
from shapes import Shape
from timing import cold_bytes, fits_hot, interleaved, percentiles, rotated
from weight import BLOCKSIZE, QUANT_TYPE, Weight

import qlora_ext._C as _C

OURS = "qlora_ext"
PATIENCE = 3  # seconds: a call that takes longer is timed once, when it is checked
# Bytes for all providers' weights, and as many for what their calls hold. The other half is for what a call computes
# in, what malloc keeps when it is freed, and the program that measures the limits.
ROOM = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
Row = dict[str, Any]


class MissingPeerError(Exception):
    """Why a provider cannot run here, in the words of the row that stands for it."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Args:
        name: as recorded; those of this library begin with its name.
        make: the weight in the form that it needs, and whatever else it keeps from call to call; raises if it cannot.
        bind: (form, inputs) -> the call that is timed, which returns the result.
        weight_bytes: that a call reads of the weight; how many copies are cold follows from it.
        copied: False where a copy takes seconds; the one weight is then used in both modes.
    """

    name: str
    make: Callable[[], Any]
    bind: Callable[[Any, Any], Callable[[], Any]]
    weight_bytes: int
    copied: bool = True

    @property
    def is_peer(self) -> bool:
        return not self.name.startswith(OURS)


@dataclass(frozen=True)
class Case:
    """What is computed from a weight.

    Args:
        inputs: handed to every provider.
        check: (name of the provider, result) -> its error, for the record; raises if it is too large.
        other_bytes: that a call moves beside the weight: its inputs and results, each once.
        flops: of a call.
        copying: its limit is the bandwidth of copying, not of reading.
        held_bytes: that a bound call holds beside the weight, at most: no more copies are bound than there is room for.
    """

    inputs: Any
    check: Callable[[str, Any], float]
    other_bytes: int
    flops: int = 0
    copying: bool = False
    held_bytes: int = 0


@dataclass(frozen=True)
class Bench:
    """An op to be measured.

    Args:
        op: its name in the rows.
        providers: of a weight; ours is the first.
        case: (weight, number of rows) -> what to compute; the number is None where the op has none.
        by_rows: whether it has one.
        double_quant: of the weight.
    """

    op: str
    providers: Callable[[Weight], list[Provider]]
    case: Callable[[Weight, Any], Case]
    by_rows: bool = True
    double_quant: bool = True


@dataclass
class Run:
    """The measuring of one process."""

    options: options.Options
    cache_bytes: int
    rows: list[Row] = field(default_factory=list)
    failures: int = 0

    def measure(self, benches: Sequence[Bench]) -> None:
        """All benches, shape by shape."""
        for shape in self.options.shapes:
            first = len(self.rows)
            before = self._limits(shape)
            for dtype in self.options.dtypes:
                for bench in benches:
                    self._measure_weight(bench, Weight(*shape, dtype, double_quant=bench.double_quant))
            after = self._limits(shape)
            for row in self.rows[first:]:
                _compare_with_limits(row, [before, after])

    def _limits(self, shape: Shape) -> limits.Limits:
        hot_bytes = min(shape[0] * shape[1] // 2, self.cache_bytes // 2)
        return limits.measure(4 * self.cache_bytes, hot_bytes, seconds=min(0.1, self.options.seconds))

    def _measure_weight(self, bench: Bench, weight: Weight) -> None:
        """One op on one weight: the providers' forms of it serve all numbers of rows."""
        same: Row = {"bench": bench.op, "shape": [weight.N, weight.K], "dtype": str(weight.dtype)[6:]}
        same |= {"quant_type": QUANT_TYPE, "blocksize": BLOCKSIZE, "double_quant": weight.double_quant}
        same |= {"huge_pages": self.options.huge_pages}
        forms: list[tuple[Provider, list[Any]]] = []
        providers = bench.providers(weight)
        cold = cold_bytes(self.cache_bytes, ROOM, len(providers))
        for provider in providers:
            try:
                forms.append((provider, self._copies(provider, cold)))
            except Exception as reason:
                self._cannot(same, provider, reason)
        for M in self.options.rows if bench.by_rows else [None]:
            of_rows = same if M is None else same | {"M": M}
            print(" ".join(str(of_rows.get(key, "")) for key in ("bench", "shape", "dtype", "M")), file=sys.stderr)
            case = bench.case(weight, M)
            for mode in self.options.modes:
                if mode == "hot" and not fits_hot(_kept_bytes(forms[0][0], case), self.cache_bytes):
                    too_large = f"it is too large for half the last-level cache of {self.cache_bytes} bytes"
                    self.rows.append(of_rows | {"mode": mode, "provider": OURS, "skipped": too_large})
                else:
                    self._measure_case(of_rows | {"mode": mode}, case, forms)

    def _copies(self, provider: Provider, cold: int) -> list[Any]:
        form = provider.make()
        if "cold" not in self.options.modes or not provider.copied:
            return [form]
        return [form, *(copy.deepcopy(form) for _ in range(-(-cold // provider.weight_bytes) - 1))]

    def _measure_case(self, same: Row, case: Case, forms: list[tuple[Provider, list[Any]]]) -> None:
        calls: dict[str, Callable[[], object]] = {}
        rows: dict[str, Row] = {}
        times: dict[str, list[float]] = {}
        for provider, copies in forms:
            held = max(1, ROOM // len(forms) // max(1, case.held_bytes))
            count = 1 if same["mode"] == "hot" else min(len(copies), held)
            try:
                bound = [provider.bind(form, case.inputs) for form in copies[:count]]
                start = time.perf_counter()
                result = bound[0]()
                spent = time.perf_counter() - start
                error = case.check(provider.name, result)
            except Exception as reason:
                self._cannot(same, provider, reason)
                continue
            if spent > PATIENCE:
                times[provider.name] = [spent]
            else:
                calls[provider.name] = rotated(bound)
            rows[provider.name] = same | {
                "provider": provider.name,
                "copies": len(bound),
                "moved_bytes": provider.weight_bytes + case.other_bytes,
                "least_bytes": forms[0][0].weight_bytes + case.other_bytes,
                "flops": case.flops,
                "copying": case.copying,
                "error": error,
            }
        times |= interleaved(calls, seconds=self.options.seconds, burst=self.options.burst, warmup=self.options.burst)
        timed = [row | percentiles(times[name]) for name, row in rows.items()]
        _compare_with_peers(timed)
        self.rows += timed

    def _cannot(self, same: Row, provider: Provider, reason: Exception) -> None:
        """A row for a provider that does not run; if it is ours, a failure."""
        said = str(reason) if isinstance(reason, MissingPeerError) else f"{type(reason).__name__}: {reason}"
        self.rows.append(same | {"provider": provider.name, "skipped": said})
        if not provider.is_peer:
            self.failures += 1
            print(f"FAILED: {provider.name}, {same}\n{traceback.format_exc()}", file=sys.stderr)


def _kept_bytes(provider: Provider, case: Case) -> int:
    """What must stay in the cache for a hot call: the weight, and where it is copied, the copy."""
    return provider.weight_bytes + (case.other_bytes if case.copying else 0)


def _compare_with_peers(rows: list[Row]) -> None:
    """Give our rows the fastest peer of the same case and how many times its time is ours."""
    peers = [row for row in rows if not row["provider"].startswith(OURS)]
    best = min(peers, key=lambda row: row["p50"], default=None)
    for row in rows:
        if best and row["provider"].startswith(OURS):
            row |= {"best_peer": best["provider"], "speedup_over_best_peer": best["p50"] / row["p50"]}
    alone = next((row for row in rows if row["provider"] == f"{OURS} linear_4bit alone"), None)
    if alone:
        rows[0]["over_linear_4bit"] = rows[0]["p50"] / alone["p50"] - 1


def _compare_with_limits(row: Row, measured: list[limits.Limits]) -> None:
    """Give a row the limits, the least time that they leave the op in 4 bits, and its share of that."""
    row["limits"] = measured
    if "p50" in row:
        row["limit_s"] = limits.least_seconds(
            measured,
            moved_bytes=row["least_bytes"],
            flops=row["flops"],
            copying=row["copying"],
            mode=row["mode"],
            dtype=getattr(torch, row["dtype"]),
            cpu_path=_C.cpu_path(),
        )
        row |= {"of_limit": row["limit_s"] / row["p50"], "gb_per_s": row["moved_bytes"] / row["p50"] / 1e9}


def main(name: str, description: str | None, benches: Sequence[Bench], *, by_rows: bool = True) -> None:
    """What a script does: measure, print the rows, and replace bench/results/<name>.jsonl by them."""
    args = options.parse(description, by_rows=by_rows)
    if args.huge_pages == "both":
        rows, failed = options.run_with_and_without_huge_pages()
    else:
        options.enter_environment(args)
        run = Run(args, cache_bytes=2**16 if args.smoke else limits.last_level_cache())
        run.measure(benches)
        rows, failed = record.stamped(run.rows), run.failures > 0
    record.print_rows(rows)
    if args.record:
        record.replace(name, rows)
    sys.exit(f"{name}: some of it failed: see above" if failed else 0)
