"""Full fine-tuning, LoRA and QLoRA side by side on the demo: trainable parameters, memory, speed and held-out loss.

Each method is one child process of `python -m qlora_ext.finetune` with the same data, split, seed and steps, so peak
memory is its own. The source's comparison: QLoRA, arXiv 2305.14314, tables 1 and 4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

LEARNING_RATE = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}  # full fine-tuning diverges at the adapters' rate
KEPT = (
    "method",
    "base_bits",
    "total_parameters",
    "trainable_parameters",
    "trainable_percent",
    "base_bytes",
    "adapter_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "peak_rss_bytes",
    "tokens_per_second",
    "held_out_loss_before",
    "held_out_loss_after",
    "dtype",
    "step",
    "examples",
)


def run(method: str, demo: Path, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Fine-tune by this method and return the figures of its report."""
    command = [sys.executable, "-m", "qlora_ext.finetune", "--method", method, "--output", str(output)]
    command += ["--model", str(demo / "model.gguf"), "--data", str(demo / "pairs.jsonl")]
    command += [
        "--steps",
        str(options.steps),
        "--batch-size",
        str(options.batch_size),
        "--schedule",
        "constant",
        "--r",
        "8",
    ]
    command += ["--lr", str(LEARNING_RATE[method]), "--samples", "0", "--seed", str(options.seed)]
    if options.smoke:
        command += ["--eval-examples", "8"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((output / "report.json").read_text())
    row = {"bench": "compare_methods", "model": "SmolLM2-135M-Instruct", "data": "chatterbot-corpus"}
    row |= {"batch": options.batch_size, "lr": LEARNING_RATE[method], "seed": options.seed}
    return row | {key: report[key] for key in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("build/demo"), help="folder of examples/demo_data.py")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(LEARNING_RATE), default=list(LEARNING_RATE))
    parser.add_argument("--smoke", action="store_true", help="one step and no record, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.batch_size = 1, 2
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(method, options.demo, options, Path(folder) / method) for method in options.methods]
    record.write("compare_methods", rows, smoke=options.smoke)


if __name__ == "__main__":
    main()
