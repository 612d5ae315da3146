"""The source distribution: all that building the extension takes, with nvcc or without, and nothing that was built.

A wheel has no modules of an earlier build; and what a user is told who has not installed all that it takes.
"""

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


def test_gone_modules_are_not_built(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "qlora_ext", tmp_path / "qlora_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    for name in ("gone.py", "here.py"):
        (tmp_path / "qlora_ext" / name).touch()
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"QLORA_EXT_CUDA": "0"}, check=True)
        assert (tmp_path / "built/qlora_ext" / name).exists()
        (tmp_path / "qlora_ext" / name).unlink()
    assert not (tmp_path / "built/qlora_ext/gone.py").exists()
    assert (tmp_path / "built/qlora_ext/py.typed").exists()


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ("sys.modules['torch'] = None", "import of torch halted"),
        ("import torch; torch.__version__ = type(torch.__version__)('2.9.1')", "this one is 2.9.1"),
    ],
)
def test_build_wants_the_torch_that_will_run(torch: str, reason: str) -> None:
    code = f"import runpy, sys; {torch}; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    line = done.stderr.splitlines()[-1]  # torch may have said before that there is no GPU
    assert line.startswith("qlora_ext is built against the torch that it runs with: first `pip install 'torch>=2.")
    assert reason in line


def test_build_wants_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    env = os.environ | {"QLORA_EXT_CUDA": "0", "CXX": "no-such-compiler -O2"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("CXX names it), got no 'no-such-compiler -O2'")


def test_sources_without_the_module_say_where_they_are(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "qlora_ext", tmp_path / "qlora_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable installation finds its own _C for any qlora_ext.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]; import qlora_ext"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"{tmp_path / 'qlora_ext'} has no compiled module _C for this Python" in done.stderr
    assert "circular" not in done.stderr


def test_finetune_names_the_package_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    code = "import sys; sys.modules['transformers'] = None; from qlora_ext.finetune.__main__ import main; main()"
    options = ["--model", "m", "--data", "data.jsonl", "--method", "qlora", "--output", "out"]
    command = [sys.executable, "-c", code, *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: needs the package transformers: install qlora_ext as `.[finetune]`" in done.stderr
    assert "Traceback" not in done.stderr
