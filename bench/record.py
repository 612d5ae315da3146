"""Results as rows of JSON in bench/results/, each with the machine, the versions and the commit that gave it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from limits import last_level_cache

import qlora_ext._C as _C

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "torchao")
# What changes the speed of a process from outside: recorded where it is set.
SETTINGS = (
    *("GLIBC_TUNABLES", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"),
    *("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"),
)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def where() -> dict[str, Any]:
    """The machine, the versions and the commit of this run; the GPU, where there is one."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_path": _C.cpu_path(),
        "last_level_cache": last_level_cache(),
        "transparent_huge_pages": _huge_pages(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    } | (_gpu() if torch.cuda.is_available() else {})


def by_machine(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each machine."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        machines.setdefault(machine(row), []).append(row)
    return machines


def stamped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with where() in each."""
    here = where()
    return [row | here for row in rows]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line of JSON each."""
    for row in rows:
        print(json.dumps(row))


def held_to(row: dict[str, Any]) -> str:
    """The instructions that torch's products were held to for a result, or ""."""
    isa: str = row.get("settings", {}).get("ONEDNN_MAX_CPU_ISA", "")
    return isa


def machine(row: dict[str, Any]) -> str:
    """What a result was measured on, as far as its speed depends on it: one line for a table."""
    held = held_to(row)
    parts = [
        row["cpu"],
        f"{row['threads']} threads",
        row["cpu_path"],
        held and f"oneDNN held to {held}",
        row.get("gpu"),
    ]
    return ", ".join(part for part in parts if part)


def replace(name: str, rows: list[dict[str, Any]], *, every_machine: bool = False) -> None:
    """Replace the rows that this machine, or any, has in bench/results/<name>.jsonl."""
    here = {machine(row) for row in rows}
    kept = [] if every_machine else [row for row in read(name) if machine(row) not in here]
    RESULTS.mkdir(exist_ok=True)
    beside = RESULTS / f"{name}.jsonl.tmp"
    beside.write_text("".join(json.dumps(row) + "\n" for row in kept + rows))
    os.replace(beside, RESULTS / f"{name}.jsonl")


def write(name: str, rows: list[dict[str, Any]], *, smoke: bool, every_machine: bool = False) -> None:
    """Stamp and print the rows, and `replace` by them unless it is a smoke run."""
    rows = stamped(rows)
    print_rows(rows)
    if not smoke:
        replace(name, rows, every_machine=every_machine)


def read(name: str) -> list[dict[str, Any]]:
    """The rows of the last full run on each machine, or an empty list."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _cpu_model() -> str:
    """The name, with family and model where the kernel tells them: clouds hide the generation of a CPU in the name."""
    told = dict.fromkeys(("model name", "cpu family", "model"), "")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in told and not told[name]:
            told[name] = value
    generation = f" (family {told['cpu family']}, model {told['model']})" if told["cpu family"] else ""
    return (told["model name"] or "unknown") + generation


def _huge_pages() -> str:
    """When the kernel gives memory in huge pages: always, madvise (to whoever asks) or never."""
    return HUGE_PAGES.read_text().partition("[")[2].partition("]")[0] if HUGE_PAGES.exists() else "never"


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "sms": properties.multi_processor_count,
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    if shutil.which("git") is None:
        return ""
    root = Path(__file__).parent.parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    changes = ["git", "status", "--porcelain", "--", "csrc", "qlora_ext", "bench/*.py", "bench/*.cpp"]
    dirty = subprocess.run(changes, cwd=root, capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
