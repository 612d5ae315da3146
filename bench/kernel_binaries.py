"""CUDA sources as PTX, ptxas's words, and machine code: what sass_report.py reads."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # for ptx, which compiles and caches
from ptx.compile import ROOT, compile_cu, compile_text, find_nvcc

KERNELS = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "sass"
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", f"-I{ROOT / 'csrc'}")
# What the Config C of a kernel says, by the first expression that it has the names for; by none: 0.
CONSTANTS = {
    "dynamic_shared": ["C::kSharedBytes"],
    "column_tiles": ["C::kColumnTiles"],
    "small_blocks": ["C::kSmallBlocks", "C::kWarpK / C::kLaneBlocks < 64"],
}


@dataclass(frozen=True)
class Binary:
    """A .cu file, compiled for one architecture."""

    ptx: str
    log: str  # of ptxas -v
    sass: str


@cache
def find_tools() -> tuple[str, str]:
    """nvcc and nvdisasm; the latter on PATH, in CUDA_HOME, beside nvcc or in a package, of which triton is one."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("needs nvcc: on PATH, or `pip install cuda-toolkit[nvcc,nvvm,crt,cccl]`")
    places = [nvcc.resolve().parent]
    places += [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
        places += [Path(str(file.locate())).parent for file in files if file.name == "nvdisasm"]
    triton = importlib.util.find_spec("triton")
    places += [Path(place) / "backends/nvidia/bin" for place in (triton and triton.submodule_search_locations) or ()]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    if nvdisasm := shutil.which("nvdisasm", path=path):
        return str(nvcc), nvdisasm
    raise FileNotFoundError("needs nvdisasm: on PATH, in CUDA_HOME/bin, or `pip install nvidia-cuda-nvdisasm`")


@cache
def nvcc_version() -> str:
    done = subprocess.run([find_tools()[0], "--version"], capture_output=True, text=True, check=True)
    return done.stdout.rpartition("V")[2].split()[0]


def compile_kernels(source: Path, arch: str) -> Binary:
    """Cached by the PTX and the tools."""
    ptx = compile_cu(source, arch, FLAGS)
    nvcc, nvdisasm = find_tools()
    key = hashlib.sha256(f"{nvcc} {nvcc_version()} {nvdisasm} {arch} {ptx}".encode()).hexdigest()[:16]
    log, sass = (CACHE / f"{source.stem}.{arch}.{key}.{suffix}" for suffix in ("log", "sass"))
    if not sass.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            (Path(folder) / "kernels.ptx").write_text(ptx)
            options = ["-cubin", f"-arch={arch}", "-O3", "-Xptxas", "-v"]
            log.write_text(_run([nvcc, *options, "-o", "kernels.cubin", "kernels.ptx"], folder).stderr)
            disassembled = _run([nvdisasm, "-c", "kernels.cubin"], folder).stdout
            (Path(folder) / "kernels.sass").write_text(disassembled)
            os.replace(Path(folder) / "kernels.sass", sass)
    return Binary(ptx, log.read_text(), sass.read_text())


def _run(command: Sequence[str], folder: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done


def demangle(names: Sequence[str]) -> list[str]:
    """linear_4bit_kernel<Config<BFloat16, 1, false>>"""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    plain = re.sub(r"\(anonymous namespace\)::|qlora::(cuda::)?|^void ", "", done.stdout, flags=re.MULTILINE)
    return [re.sub(r" (?=>)", "", line.split("(")[0]) for line in plain.splitlines()]


def config_constants(source: Path, kernels: Sequence[str]) -> list[dict[str, int]]:
    """CONSTANTS of the Config that each of the (demangled) kernels is made for, as the compiler evaluates them."""
    text = [f'#include "{source.resolve()}"', "namespace qlora::cuda {"]
    for name, expressions in CONSTANTS.items():
        choices = [f"if constexpr (requires {{ {value}; }}) return {value}; else " for value in expressions]
        text.append(f"template <typename C> constexpr int {name}_of() {{ {''.join(choices)}return 0; }}")
    for i, kernel in enumerate(kernels):
        config = kernel.partition("<")[2][:-1]
        if not config:
            raise ValueError(f"{source.name}: {kernel} has dynamic shared memory, but no Config that says how much")
        text += [f'extern "C" __device__ int {name}_{i} = {name}_of<{config}>();' for name in CONSTANTS]
    # Without optimizing: only the constants are wanted.
    ptx = compile_text("\n".join([*text, "}", ""]), f"{source.stem}_constants", "sm_80", (*FLAGS, "-Xcicc", "-O0"))
    values = {name: int(value or 0) for name, value in re.findall(r"\.u32 (\w+_\d+)(?: = (\d+))?;", ptx)}
    return [{name: values[f"{name}_{i}"] for name in CONSTANTS} for i in range(len(kernels))]
