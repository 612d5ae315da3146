"""The command line of the CPU benches, and the environment that a measuring process must have."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import shapes
import torch

import qlora_ext._C as _C

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# What one computes in here, as `finetune` does: without instructions for bf16, torch takes ten times as long in it.
NATIVE = "bf16" if "avx512_bf16" in _C.cpu_paths() else "fp32"
# oneDNN's products are held to the instructions of the path that ours is held to; MKL's, torch's of fp32, are not.
ONEDNN_ISA = {
    "portable": "SSE41",
    "avx2": "AVX2",
    "avx512": "AVX512_CORE",
    "avx512_bf16": "AVX512_CORE_BF16",
    "amx": "AVX512_CORE_AMX",
}
# In huge pages, and kept between calls: the kernel fills each page with zeros that malloc asks for anew.
MALLOC = {
    "glibc.malloc.hugetlb": "1",
    "glibc.malloc.mmap_max": "0",
    "glibc.malloc.trim_threshold": str(1 << 40),
}
SMOKE_SHAPE = "128x256"


@dataclass(frozen=True)
class Options:
    """What to measure, how long, and what for."""

    shapes: list[shapes.Shape]
    rows: list[int]
    dtypes: list[torch.dtype]
    modes: list[str]
    cpu_path: str | None
    huge_pages: str
    seconds: float
    burst: float
    smoke: bool
    record: bool


def parser(description: str | None, *, dtype: list[str], seconds: float) -> argparse.ArgumentParser:
    """One with the options that all of these benches have, with these defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=dtype)
    made.add_argument("--cpu-path", choices=list(ONEDNN_ISA), help="that ours must take, and oneDNN's limit with it")
    pages = "for malloc, which keeps them; both (the default): one process after the other, each without and with"
    made.add_argument("--huge-pages", choices=["off", "on", "both"], default="both", help=pages)
    made.add_argument("--seconds", type=float, default=seconds, help="of measuring for each provider of a case")
    made.add_argument("--no-record", action="store_true", help="only print the rows")
    made.add_argument("--smoke", action="store_true", help="a small case, no record: to see that it runs")
    return made


def parsed(parser: argparse.ArgumentParser, *, burst: float) -> argparse.Namespace:
    """The options of this process's command line, with `burst` seconds and whether to `record`."""
    args = parser.parse_args()
    args.burst, args.record = burst, not (args.no_record or args.smoke)
    if args.smoke:
        args.seconds, args.burst = 0.002, 0.001
        args.huge_pages = "off" if args.huge_pages == "both" else args.huge_pages
    return args


def parse(description: str | None, *, by_rows: bool) -> Options:
    """Those of a bench of an op on weights."""
    ops = parser(description, dtype=[NATIVE], seconds=0.3)
    names = f"NxK (out x in), or all layers of one of: {', '.join(shapes.MODELS)}"
    ops.add_argument("--shapes", nargs="+", default=list(shapes.DEFAULT), metavar="SHAPE", help=names)
    if by_rows:
        ops.add_argument("--rows", nargs="+", type=int, default=list(shapes.ROWS), metavar="M", help="of the input")
    ops.add_argument("--mode", nargs="+", choices=["hot", "cold"], default=["hot", "cold"])
    args = parsed(ops, burst=0.05)
    try:
        selected = shapes.select([SMOKE_SHAPE] if args.smoke else args.shapes)
    except ValueError as error:
        ops.error(str(error))
    return Options(
        shapes=selected,
        rows=([1, 4] if args.smoke else args.rows) if by_rows else [],
        dtypes=[DTYPES[name] for name in args.dtype],
        modes=args.mode,
        cpu_path=args.cpu_path,
        huge_pages=args.huge_pages,
        seconds=args.seconds,
        burst=args.burst,
        smoke=args.smoke,
        record=args.record,
    )


def environment(options: Options | argparse.Namespace, base: Mapping[str, str]) -> dict[str, str]:
    """What the libraries must find when they are loaded, or, malloc, before."""
    env = dict(base)
    tunables = [entry for entry in env.pop("GLIBC_TUNABLES", "").split(":") if entry]
    tunables = [entry for entry in tunables if entry.partition("=")[0] not in MALLOC]
    tunables += [f"{name}={value}" for name, value in MALLOC.items() if options.huge_pages == "on"]
    if tunables:
        env["GLIBC_TUNABLES"] = ":".join(tunables)
    if options.cpu_path:
        env["QLORA_EXT_CPU"] = options.cpu_path
        env["ONEDNN_MAX_CPU_ISA"] = ONEDNN_ISA[options.cpu_path]
    return env


def enter_environment(options: Options | argparse.Namespace) -> None:
    """Start this process anew, unless its environment is right already."""
    if (env := environment(options, os.environ)) != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def run_with_and_without_huge_pages() -> tuple[list[dict[str, Any]], bool]:
    """The rows of this command run in two processes, and whether one of them failed."""
    rows, failed = [], False
    for pages in ("off", "on"):
        command = [sys.executable, *sys.orig_argv[1:], "--huge-pages", pages, "--no-record"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
        failed |= done.returncode != 0
    return rows, failed
