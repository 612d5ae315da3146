"""The compiler: its cache must notice every edit, and a machine without it must not pass silently in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import compile, compile_cu, find_nvcc

NO_NVCC = """
import importlib.metadata, shutil
shutil.which = lambda name: None
def files(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.files = files
from ptx import compile_cu
def test_kernel(): compile_cu("kernel.cu")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compile, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []
    run_nvcc = compile.run_nvcc

    def counting(arguments: list[str | Path]) -> None:
        calls.append(arguments)
        run_nvcc(arguments)

    monkeypatch.setattr(compile, "run_nvcc", counting)
    return calls


def test_cache_sees_the_text_of_every_header(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_compilations(monkeypatch)
    header, inner, source = tmp_path / "a b.h", tmp_path / "inner.h", tmp_path / "kernel.cu"
    inner.write_text("#define VALUE 41")
    header.write_text('#include "inner.h"')
    source.write_text('#include "a b.h"\nextern "C" __global__ void k(int* o) { *o = VALUE; }')
    assert ", 41;" in compile_cu(source)
    compile_cu(source)
    assert len(calls) == 1
    inner.write_text("#define VALUE 42")
    assert ", 42;" in compile_cu(source)
    os.utime(inner, (0, 0))  # neither older nor newer files matter, their text does
    compile_cu(source)
    assert len(calls) == 2
    assert ", 42;" in compile_cu(source, flags=("-O1",))
    assert "sm_90" in compile_cu(source, arch="sm_90")
    assert len(calls) == 4
    assert sorted(file.suffix for file in cache.iterdir()) == [".json"] * 3 + [".ptx"] * 3


@pytest.mark.usefixtures("cache")
def test_error_is_the_compilers_own(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void k() { nonsense; }")
    with pytest.raises(RuntimeError, match='"nonsense" is undefined'):
        compile_cu(source)


def test_nvcc_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where PATH has none, the package nvidia-cuda-nvcc of this environment is asked."""
    package = tmp_path / "nvidia" / "cu13" / "bin"
    package.mkdir(parents=True)
    (package / "nvcc").touch()
    information = tmp_path / "nvidia_cuda_nvcc-13.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 13.0\n")
    (information / "RECORD").write_text("nvidia/cu13/bin/nvcc,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    find_nvcc.cache_clear()
    assert find_nvcc() == package / "nvcc"
    find_nvcc.cache_clear()


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 failed")])
def test_no_nvcc_skips_but_fails_in_ci(tmp_path: Path, ci: str, outcome: str) -> None:
    test = tmp_path / "test_without.py"
    test.write_text(NO_NVCC)
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        "-c",
        os.devnull,
        test,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert outcome in done.stdout
    assert "needs nvcc: on PATH, or `pip install cuda-toolkit[nvcc,nvvm,crt,cccl]`" in done.stdout
    assert done.returncode == (1 if ci else 0)
