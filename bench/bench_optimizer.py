"""One step of AdamW with all states in memory: ours in 32 and 8 bits, torch's fused one, bitsandbytes' two, on the CPU.

The parameters are one tensor (flat) or the LoRA adapters of all linear layers of Llama-7B (lora: 448 tensors). Before
anything is timed, every provider makes three steps on small parameters, which are compared with AdamW in fp64: a wrong
result of ours is a failure, one of a peer is recorded as its error. The limit is the bandwidth of copying, measured
before and after each case.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any

import limits
import options
import record
import torch
from optimizer_providers import OURS, PROVIDERS, SAME, Provider
from shapes import MODELS
from timing import interleaved, percentiles
from torch import Tensor

import qlora_ext._C as _C

Row = dict[str, Any]
CHECKED_SIZES, CHECKED_STEPS = (70_000, 4096, 300), 3
LAYERS, R = 32, 16  # of Llama-7B; of its adapters
# A peer with as many bits in its states, which ours is compared with.
RIVALS = {32: ("torch AdamW, fused", "bitsandbytes AdamW"), 8: ("bitsandbytes AdamW8bit",)}


def sizes(layout: str, elements: int) -> list[int]:
    """Of the parameters."""
    if layout == "flat":
        return [elements]
    layer = [(n, k) for names, (n, k) in MODELS["Llama-7B"].items() for _ in names.split(", ")]
    return [R * width for n, k in layer for width in (k, n)] * LAYERS


def make_parameters(sizes: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters, gradients) as in a training: of each a tenth of the gradients is 0."""
    params = [torch.randn(n).mul_(0.02).to(dtype) for n in sizes]
    grads = [torch.randn(n).mul_(0.01).mul_(torch.rand(n) > 0.1).to(dtype) for n in sizes]
    return params, grads


# --- is it AdamW? ------------------------------------------------------------


def error(provider: Provider, dtype: torch.dtype) -> float:
    """How far some steps end from where AdamW in fp64 ends, as a fraction of the way."""
    torch.manual_seed(0)
    start, _ = make_parameters(list(CHECKED_SIZES), dtype)
    params = [p.clone() for p in start]
    exact = [p.double() for p in start]
    grads = [torch.empty_like(p) for p in start]
    exact_grads = [torch.empty_like(p) for p in exact]
    step, exact_step = provider.make(params, grads), torch.optim.AdamW(exact, **SAME).step
    for p, grad in zip(exact, exact_grads, strict=True):
        p.grad = grad
    for _ in range(CHECKED_STEPS):
        for grad, exact_grad, new in zip(
            grads, exact_grads, make_parameters(list(CHECKED_SIZES), dtype)[1], strict=True
        ):
            grad.copy_(new)
            exact_grad.copy_(new)
        step()
        exact_step()
    pairs = list(zip(params, exact, start, strict=True))
    off = sum(float((p.double() - x).square().sum()) for p, x, _ in pairs)
    way = sum(float((x - s.double()).square().sum()) for _, x, s in pairs)
    return (off / way) ** 0.5


def bound(bits: int, dtype: torch.dtype) -> float:
    """Of our error: what rounding the parameters costs a torch with the same states, and what 8 bits may add."""
    [fused] = [one for one in PROVIDERS if one.name == RIVALS[32][0]]
    return 2 * error(fused, dtype) + (0.1 if bits == 8 else 0.0)


# --- how long does it take? ------------------------------------------------------------


def measure_resident(args: argparse.Namespace) -> tuple[list[Row], bool]:
    """All rows with the states in memory, and whether one of ours failed."""
    rows: list[Row] = []
    failed = False
    for layout in args.layout:
        for name in args.dtype:
            dtype = options.DTYPES[name]
            params, grads = make_parameters(sizes(layout, args.elements), dtype)
            same: Row = {"bench": "optimizer", "layout": layout, "tensors": len(params), "dtype": str(dtype)[6:]}
            same |= {"elements": sum(p.numel() for p in params), "huge_pages": args.huge_pages}
            print(layout, name, file=sys.stderr)
            before = measure_limits(args)
            case, wrong = measure_case(same, params, grads, dtype, args)
            after = measure_limits(args)
            for row in case:
                compare(row, case, [before, after], dtype)
            rows += case
            failed |= wrong
    return rows, failed


def measure_case(
    same: Row, params: list[Tensor], grads: list[Tensor], dtype: torch.dtype, args: argparse.Namespace
) -> tuple[list[Row], bool]:
    """A row for each provider; all step on the same parameters, so that each has the memory of one."""
    rows: list[Row] = []
    failed = False
    steps: dict[str, Callable[[], object]] = {}
    for provider in PROVIDERS:
        row = same | {"provider": provider.name, "bits": provider.bits}
        try:
            row["error"] = error(provider, dtype)
            if provider.name.startswith(OURS):
                most = bound(provider.bits, dtype)
                assert row["error"] <= most, f"it is {row['error']:.3g} of the way off, more than {most:.3g}"
            steps[provider.name] = provider.make(params, grads)
            row["moved_bytes"] = provider.moved_bytes(params)
        except Exception as reason:
            row["skipped"] = f"{type(reason).__name__}: {reason}"
            if provider.name.startswith(OURS):
                failed = True
                print(f"FAILED: {row}\n{traceback.format_exc()}", file=sys.stderr)
        rows.append(row)
    times = interleaved(steps, seconds=args.seconds, burst=args.burst, warmup=args.burst)
    timed = [row | percentiles(times[row["provider"]]) if row["provider"] in times else row for row in rows]
    return timed, failed


def measure_limits(args: argparse.Namespace) -> limits.Limits:
    cache = 2**16 if args.smoke else limits.last_level_cache()
    return limits.measure(4 * cache, cache // 2, seconds=min(0.1, args.seconds))


def compare(row: Row, rows: list[Row], measured: list[limits.Limits], dtype: torch.dtype) -> None:
    """Give a row its share of the limit, and if it is ours, the peers with as many bits and our own 32 bits."""
    row["limits"] = measured
    if "p50" not in row:
        return
    row["limit_s"] = limits.least_seconds(
        measured,
        moved_bytes=row["moved_bytes"],
        flops=0,
        copying=True,
        mode="cold",
        dtype=dtype,
        cpu_path=_C.cpu_path(),
    )
    row |= {"of_limit": row["limit_s"] / row["p50"], "gb_per_s": row["moved_bytes"] / row["p50"] / 1e9}
    if row["provider"].startswith(OURS):
        seconds = {other["provider"]: other["p50"] for other in rows if "p50" in other}
        row["speedup_over"] = {peer: seconds[peer] / row["p50"] for peer in RIVALS[row["bits"]] if peer in seconds}
        row["over_32_bit"] = row["p50"] / seconds[f"{OURS} AdamW, 32-bit"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**25, help="of the flat layout (default: 2^25)")
    parser.add_argument("--layout", nargs="+", choices=["flat", "lora"], default=["flat", "lora"])
    parser.add_argument("--dtype", nargs="+", choices=list(options.DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--cpu-path", choices=list(options.ONEDNN_ISA), help="that ours must take")
    pages = "for malloc; both (the default): one process after the other, each without and with"
    parser.add_argument("--huge-pages", choices=["off", "on", "both"], default="both", help=pages)
    parser.add_argument("--seconds", type=float, default=2, help="of measuring for each provider of a case")
    parser.add_argument("--no-record", action="store_true", help="only print the rows")
    parser.add_argument("--smoke", action="store_true", help="few elements, no record: to see that it runs")
    args = parser.parse_args()
    args.burst = 0.2
    if args.smoke:
        args.elements, args.layout, args.seconds, args.burst = 2**16, ["flat"], 0.002, 0.001
        args.huge_pages = "off" if args.huge_pages == "both" else args.huge_pages
    return args


def main() -> None:
    args = parse()
    if args.huge_pages == "both":
        rows, failed = options.run_with_and_without_huge_pages()
    else:
        options.enter_environment(args)
        measured, failed = measure_resident(args)
        rows = record.stamped(measured)
    record.print_rows(rows)
    if not (args.no_record or args.smoke):
        record.replace("optimizer", rows)
    sys.exit("bench_optimizer.py: some of it failed: see above" if failed else 0)


if __name__ == "__main__":
    main()
