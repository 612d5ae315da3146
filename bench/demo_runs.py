"""Fine-tuning the demo by `python -m qlora_ext.finetune`, each time in a child process, so that peak memory is its own.

What is compared has the same data, split, seed and steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LEARNING_RATE = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}  # full fine-tuning diverges at the adapters' rate


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a comparison."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--demo", type=Path, default=Path("build/demo"), help="folder of examples/demo_data.py")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--smoke", action="store_true", help="one step and no record, to see that it runs")
    return options


def run(method: str, options: argparse.Namespace, output: Path, *more: str) -> dict[str, Any]:
    """Fine-tune by this method, with more options of the command; return its report and what it was made with."""
    steps, batch = (1, 2) if options.smoke else (options.steps, options.batch_size)
    command = [sys.executable, "-m", "qlora_ext.finetune", "--method", method, "--output", str(output)]
    command += ["--model", str(options.demo / "model.gguf"), "--data", str(options.demo / "pairs.jsonl")]
    command += ["--steps", str(steps), "--batch-size", str(batch), "--schedule", "constant", "--r", "8"]
    command += ["--lr", str(LEARNING_RATE[method]), "--samples", "0", "--seed", str(options.seed), *more]
    if options.smoke:
        command += ["--eval-examples", "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    made = {"model": "SmolLM2-135M-Instruct", "data": "chatterbot-corpus"}
    made |= {"batch": batch, "lr": LEARNING_RATE[method], "seed": options.seed}
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return made | report
