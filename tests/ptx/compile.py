"""CUDA source to PTX with nvcc, cached by the text of every file that went into it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "ptx"


@functools.cache
def find_nvcc() -> Path | None:
    """On PATH, or from the package nvidia-cuda-nvcc."""
    if found := shutil.which("nvcc"):
        return Path(found)
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nvcc"), None)


def require_nvcc() -> Path:
    """nvcc, or the test is skipped; where CI is true it fails instead, so that CI cannot pass by skipping."""
    if nvcc := find_nvcc():
        return nvcc
    message = "needs nvcc: on PATH, or `pip install cuda-toolkit[nvcc,nvvm,crt,cccl]`"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def run_nvcc(arguments: Sequence[str | Path]) -> None:
    """RuntimeError with nvcc's own words if it fails."""
    done = subprocess.run([require_nvcc(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc {' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")


@functools.cache
def _version(nvcc: Path) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _digest(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return "missing"


def _dependencies(makefile: str) -> list[str]:
    """The files of a make rule `target : a b \\ c`."""
    files = re.split(r"(?<!\\)\s+", makefile.replace("\\\n", " ").split(" : ", 1)[1].strip())
    return [file.replace("\\ ", " ") for file in files]


def compile_cu(source: str | Path, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """The PTX of a .cu file."""
    nvcc, source = require_nvcc(), Path(source).resolve()
    key = hashlib.sha256(repr((str(source), arch, list(flags), _version(nvcc))).encode()).hexdigest()[:16]
    ptx, inputs = (CACHE / f"{source.stem}.{key}.{suffix}" for suffix in ("ptx", "json"))
    if ptx.exists() and inputs.exists():
        before = json.loads(inputs.read_text())
        if all(_digest(file) == digest for file, digest in before.items()):
            return ptx.read_text()
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh, makefile = (CACHE / f"{source.stem}.{key}.{os.getpid()}.{suffix}" for suffix in ("ptx", "d"))
    run_nvcc(["-ptx", f"-arch={arch}", *flags, "-MD", "-MF", makefile, "-o", fresh, source])
    digests = {file: _digest(file) for file in _dependencies(makefile.read_text())}
    makefile.unlink()
    os.replace(fresh, ptx)
    _write(inputs, json.dumps(digests))
    return ptx.read_text()


def compile_text(text: str, name: str, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """The PTX of CUDA source that a test wrote."""
    return compile_cu(write_source(text, name), arch, flags)


def write_source(text: str, name: str) -> Path:
    """A .cu file in the cache; one that holds the text already is left alone."""
    source = CACHE / f"{name}.cu"
    if not source.exists() or source.read_text() != text:
        CACHE.mkdir(parents=True, exist_ok=True)
        _write(source, text)
    return source


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, path)
