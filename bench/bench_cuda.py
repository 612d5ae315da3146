"""The CUDA kernels against bitsandbytes, dense cuBLAS products and device copies: bf16, NF4, double quantization.

A timed pass goes over distinct weights that fill the L2 four times, at least 8 calls, eager or as one CUDA graph; the
times are those of a call. Every result is checked first: ours must equal the CPU's bytes (quantize, dequantize: error
0) or be at most twice as far from the fp64 result as torch's bf16 product (error 1). Limits, measured in the same run:
the bytes that a call must move at the bandwidth of a device copy, and its flops at the rate of a large cuBLAS product.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import cuda_providers as providers
import record
import torch
from cuda_device import DryRun, Gpu, interleaved
from cuda_providers import COPY, DTYPE, FORMAT, OURS, Provider, Weights
from timing import percentiles

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # (N, K)
TINY_SHAPES = ((64, 128), (128, 64))
ROWS = (1, 4, 16, 64, 128, 512, 2048)
MIN_CALLS = 8  # of a pass: the gap between two graphs would count in a shorter one
Row = dict[str, Any]


@dataclass
class Run:
    """One run of the benches: where, how long, and what it found."""

    where: Gpu | DryRun
    seconds: float
    deadline: float
    copied_bytes: int
    matmul_size: int
    rows: list[Row] = field(default_factory=list)
    failures: int = 0
    copy_bytes_per_s: float = 0
    flops_per_s: float = 0

    def measure_limits(self) -> None:
        """The bandwidth of a copy (read and written bytes) and the rate of a large product; again for each shape."""
        source = torch.zeros(self.copied_bytes // 2, dtype=torch.uint8, device=self.where.device)
        target = torch.empty_like(source)
        square = torch.randn(self.matmul_size, self.matmul_size, device=self.where.device).to(DTYPE)
        out = torch.empty_like(square)
        passes: dict[str, Callable[[], object]] = {
            COPY: lambda: target.copy_(source),
            "cuBLAS matmul": lambda: torch.mm(square, square, out=out),
        }
        times = {name: percentiles(t) for name, t in interleaved(self.where, passes, seconds=self.seconds).items()}
        self.copy_bytes_per_s = self.copied_bytes / times[COPY]["p50"]
        self.flops_per_s = 2 * self.matmul_size**3 / times["cuBLAS matmul"]["p50"]
        rates = {COPY: {"gb_per_s": self.copy_bytes_per_s / 1e9}}
        rates["cuBLAS matmul"] = {"tflops": self.flops_per_s / 1e12}
        self.rows += [{"bench": "limits", "provider": name} | times[name] | rates[name] for name in passes]

    def compare(self, same: Row, entries: list[Provider], count: int, moved_bytes: int, flops: int = 0) -> None:
        """Check and time the providers of one case, eager and as graphs."""
        passes: dict[tuple[str, str], Callable[[], object]] = {}
        errors: dict[tuple[str, str], float] = {}
        order = [i % count for i in range(max(count, -(-MIN_CALLS // count) * count))]
        for provider, mode in product(entries, ("eager", "graph")):
            key = (provider.name, mode)
            reason = provider.unavailable or (provider.eager_only if mode == "graph" else "")
            if not reason:
                run = partial(_one_pass, provider.call, order)
                try:
                    passes[key], results = (run, run()) if mode == "eager" else self.where.graph(run)
                    errors[key] = provider.error(results[0])
                    del results  # as large as a pass: not to be kept through the next one
                    assert errors[key] <= provider.allowed, f"error {errors[key]:.3g}, allowed {provider.allowed}"
                except Exception as failure:
                    if provider.name == OURS:
                        raise
                    passes.pop(key, None)
                    reason = f"{type(failure).__name__}: {failure}"
            if reason:
                self.rows.append(same | {"provider": provider.name, "mode": mode, "skipped": reason})
        times = {
            key: percentiles([t / len(order) for t in spent])
            for key, spent in interleaved(self.where, passes, seconds=self.seconds).items()
        }
        limit = max(moved_bytes / self.copy_bytes_per_s, flops / self.flops_per_s)
        for key, timed in times.items():
            name, mode = key
            row = same | {"provider": name, "mode": mode, "copies": count} | timed
            row |= {"gb_per_s": moved_bytes / timed["p50"] / 1e9, "of_limit": limit / timed["p50"]}
            row |= {"error": errors[key]}
            peers = [t["p50"] for (who, how), t in times.items() if who not in (OURS, COPY) and how == mode]
            if name == OURS and peers:
                row["speedup_over_best_peer"] = min(peers) / timed["p50"]
            self.rows.append(row)

    def attempt(self, same: Row, bench: Callable[[Row], None]) -> None:
        """Run one case; a failure is told and counted, and the rest goes on."""
        case = ", ".join(str(same[key]) for key in ("bench", "shape", "M") if key in same)
        if time.monotonic() > self.deadline:
            self.failures += 1  # a table with holes is no result
            self.rows.append(same | {"provider": OURS, "skipped": "the time was up"})
            return
        print(case, file=sys.stderr)
        try:
            bench(same)
        except Exception:
            self.failures += 1
            print(f"FAILED: {case}\n{traceback.format_exc()}", file=sys.stderr)


def _one_pass(call: Callable[[int], Any], order: list[int]) -> list[Any]:
    # All results of a pass are kept to its end: else each would be written over the last, in the cache.
    return [call(i) for i in order]


def bench_weight(run: Run, N: int, K: int, _: Row) -> None:
    """All benches on weights of one shape."""
    run.measure_limits()
    w = Weights(N, K, run.where.cache_bytes, run.where.device)
    same: Row = {"shape": [N, K], "dtype": str(DTYPE)[6:], "quant_type": FORMAT[0], "blocksize": FORMAT[1]}
    same["double_quant"] = True

    def elementwise(of: Callable[[Weights], list[Provider]], same: Row) -> None:
        run.compare(same, of(w), w.count, w.dense_bytes + w.packed_bytes)

    run.attempt({"bench": "dequantize_4bit"} | same, partial(elementwise, providers.dequantize_providers))
    run.attempt({"bench": "quantize_4bit"} | same, partial(elementwise, providers.quantize_providers))

    decoded = w.decoded_on_cpu(torch.float32).to(run.where.device).double()
    directions = {
        "linear_4bit": (providers.linear_providers, K),
        "linear_4bit_dgrad": (providers.dgrad_providers, N),
    }
    for M, (name, (of, inner)) in product(ROWS, directions.items()):

        def matmul(same: Row, M: int = M, of: Any = of, inner: int = inner) -> None:
            x = torch.randn(M, inner, device=run.where.device).to(DTYPE)
            moved = w.packed_bytes + M * (N + K) * DTYPE.itemsize
            run.compare(same, of(w, decoded, x), w.count, moved, 2 * M * N * K)

        run.attempt({"bench": name, "M": M} | same, matmul)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring for each provider of a case")
    parser.add_argument("--budget", type=float, default=180, help="seconds after which no further case is begun")
    dry_run = "every bench on tiny CPU tensors, by the CPU's clock, and no record: to see that the script runs"
    parser.add_argument("--dry-run", "--smoke", action="store_true", help=dry_run)
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry-run goes through the benches without one")
    deadline = time.monotonic() + args.budget
    shapes: tuple[tuple[int, int], ...]
    if args.dry_run:
        torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives
        run, shapes = Run(DryRun(), 1e-3, deadline, copied_bytes=2**16, matmul_size=64), TINY_SHAPES
    else:
        run, shapes = Run(Gpu(), args.seconds, deadline, copied_bytes=2**30, matmul_size=8192), SHAPES
    with torch.no_grad():
        for N, K in shapes:
            run.attempt({"bench": "all", "shape": [N, K]}, partial(bench_weight, run, N, K))
            run.where.free()
    if run.rows:
        record.write("cuda", run.rows, smoke=args.dry_run)
    sys.exit(f"bench_cuda.py: {run.failures} cases failed" if run.failures else 0)


if __name__ == "__main__":
    main()
