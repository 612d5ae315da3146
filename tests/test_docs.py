"""README.md: its examples run, the paths it names exist; its tables and RESULTS.md's are those of bench/results/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_ext import _C

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MADE_BY_COMMANDS = ("build/", ".venv/")  # not in the tree


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda code: code.splitlines()[-1][:40])
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5


def test_named_paths_exist() -> None:
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|h|cpp|md))`", README)
    paths = [name for name in named if not name.startswith(MADE_BY_COMMANDS)]
    assert paths
    for path in paths:
        found = (ROOT / path).exists() or (ROOT / "qlora_ext" / path).exists()
        assert found, f"README.md names {path}, which is not in the tree"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE))
    targets = {name for pair in targets for name in pair if name}
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "lint", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target} in the Makefile"


def test_tables_are_current() -> None:
    check = subprocess.run([sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("module", ["qlora_ext.info", "qlora_ext.finetune"])
def test_help_says_something(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout


def test_info_says_what_runs() -> None:
    out = subprocess.run([sys.executable, "-m", "qlora_ext.info"], capture_output=True, text=True, check=True).stdout
    said = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    assert said["CPU path"].split()[0] == _C.cpu_path()
    assert said["torch"] == torch.__version__
    assert said["threads"].isdigit()
