"""The source distribution: all that building the extension takes, with nvcc or without, and nothing that was built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="which files belong to it is known to git")
def test_sdist_holds_every_source_and_nothing_built(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in filter(lambda name: (ROOT / name).exists(), tracked):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "qlora_ext" / "_C.so").touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    env = os.environ | {"QLORA_EXT_CUDA": "0"}  # an sdist made where there is no nvcc is built elsewhere for CUDA
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    needed |= {name for name in tracked if name.startswith(("cmake/", "csrc/", "qlora_ext/", "tests/cpp/"))}
    assert needed - packed == set()
    assert [name for name in packed if name.endswith((".so", ".pyc"))] == []
