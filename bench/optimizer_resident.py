"""One step of AdamW with all states in memory: is it AdamW, how long does it take, and against whom."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any

import limits
import options
import torch
from optimizer_parameters import finished, make_parameters, sizes
from optimizer_providers import OURS, PROVIDERS, SAME, Provider, state_bytes
from timing import interleaved, percentiles
from torch.nn import Parameter

Row = dict[str, Any]
CHECKED_SIZES, CHECKED_STEPS = (70_000, 4096, 300), 3
COPIED_BYTES = 2**30  # on a GPU


def measure(args: argparse.Namespace) -> tuple[list[Row], bool]:
    """All rows with the states in memory, and whether one of ours failed."""
    rows: list[Row] = []
    failed = False
    for layout in args.layout:
        for name in args.dtype:
            dtype = options.DTYPES[name]
            params = make_parameters(sizes(layout, args.elements), dtype, args.device)
            same: Row = {"bench": "optimizer", "device": args.device.type, "layout": layout, "tensors": len(params)}
            same |= {"elements": sum(p.numel() for p in params), "dtype": str(dtype)[6:]}
            same |= {"huge_pages": args.huge_pages}
            print(f"resident, {layout}, {name}", file=sys.stderr)
            before = measure_limits(args)
            case, wrong = measure_case(same, params, dtype, args)
            after = measure_limits(args)
            compare(case, [before, after])
            rows += case
            failed |= wrong
    return rows, failed


def measure_case(
    same: Row, params: list[Parameter], dtype: torch.dtype, args: argparse.Namespace
) -> tuple[list[Row], bool]:
    """A row for each provider; all step on the same parameters, so that each has the memory of one."""
    rows: list[Row] = []
    failed = False
    steps: dict[str, Callable[[], object]] = {}
    for provider in PROVIDERS:
        row = same | {"provider": provider.name, "bits": provider.bits, "offloaded": provider.offloaded}
        try:
            if provider.cuda_only and args.device.type != "cuda":
                row["skipped"] = "it needs a CUDA device"
            else:
                row["error"] = checked_error(provider, dtype, args.device)
                optimizer = provider.make(params)
                optimizer.step()
                row["state_bytes"] = state_bytes(optimizer)
                row["moved_bytes"] = moved_bytes(row, params)
                steps[provider.name] = finished(optimizer.step, args.device)
        except Exception as reason:
            row["skipped"] = f"{type(reason).__name__}: {reason}"
            if provider.is_ours:
                failed = True
                print(f"FAILED: {row}\n{traceback.format_exc()}", file=sys.stderr)
        rows.append(row)
    times = interleaved(steps, seconds=args.seconds, burst=args.burst, warmup=args.burst)
    return [row | percentiles(times[row["provider"]]) if row["provider"] in times else row for row in rows], failed


# --- is it AdamW? ------------------------------------------------------------


def checked_error(provider: Provider, dtype: torch.dtype, device: torch.device) -> float:
    """The error of a provider, which if it is ours must be no more than rounding as torch does, and 8 bits, explain."""
    found = error(provider, dtype, device)
    if provider.is_ours:
        [fused] = [one for one in PROVIDERS if one.name == "torch AdamW, fused"]
        most = 2 * error(fused, dtype, device) + (0.1 if provider.bits == 8 else 0.0)
        assert found <= most, f"it is {found:.3g} of the way off, more than {most:.3g}"
    return found


def error(provider: Provider, dtype: torch.dtype, device: torch.device) -> float:
    """How far some steps end from where AdamW in fp64 ends, as a fraction of the way."""
    torch.manual_seed(0)
    params = make_parameters(list(CHECKED_SIZES), dtype, device)
    start = [p.detach().double() for p in params]
    exact = [Parameter(p.clone()) for p in start]
    optimizers = provider.make(params), torch.optim.AdamW(exact, **SAME)
    for _ in range(CHECKED_STEPS):
        for p, x, new in zip(params, exact, make_parameters(list(CHECKED_SIZES), dtype, device), strict=True):
            assert new.grad is not None
            p.grad, x.grad = new.grad, new.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    pairs = [(p.detach().double(), x.detach(), s) for p, x, s in zip(params, exact, start, strict=True)]
    off = sum(float((p - x).square().sum()) for p, x, _ in pairs)
    way = sum(float((x - s).square().sum()) for _, x, s in pairs)
    return (off / way) ** 0.5


# --- how good is that? ------------------------------------------------------------


def moved_bytes(row: Row, params: list[Parameter]) -> int:
    """That a step cannot but move: parameters and states both ways, gradients one way."""
    states = min(row["state_bytes"], row["elements"] * row["bits"] // 4)
    return sum(3 * p.nbytes for p in params) + 2 * int(states)


def measure_limits(args: argparse.Namespace) -> limits.Limits:
    """The machine's limits; of a GPU, the bandwidth of copying alone."""
    if args.device.type == "cuda":
        source = torch.zeros(COPIED_BYTES // 2, dtype=torch.uint8, device=args.device)
        copy = finished(lambda: torch.clone(source), args.device)
        [times] = interleaved({"copy": copy}, seconds=args.seconds / 10).values()
        return {"copy": COPIED_BYTES / percentiles(times)["p50"]}
    cache = 2**16 if args.smoke else limits.last_level_cache()
    return limits.measure(4 * cache, cache // 2, seconds=min(0.1, args.seconds))


def compare(rows: list[Row], measured: list[limits.Limits]) -> None:
    """Give each row its share of the limit, and ours the peers that keep as many bits in the same memory."""
    timed = [row for row in rows if "p50" in row]
    for row in rows:
        row["limits"] = measured
    for row in timed:
        row["limit_s"] = row["moved_bytes"] / max(one["copy"] for one in measured)
        row |= {"of_limit": row["limit_s"] / row["p50"], "gb_per_s": row["moved_bytes"] / row["p50"] / 1e9}
    ours = [row for row in timed if row["provider"].startswith(OURS)]
    for row in ours:
        peers = [other for other in timed if other not in ours and kind(other) == kind(row)]
        row["speedup_over"] = {peer["provider"]: peer["p50"] / row["p50"] for peer in peers}
        row["over_32_bit"] = row["p50"] / next(one["p50"] for one in ours if kind(one) == (32, row["offloaded"]))


def kind(row: Row) -> tuple[int, bool]:
    """What must be the same of two optimizers to be compared."""
    return row["bits"], row["offloaded"]
