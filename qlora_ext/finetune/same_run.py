"""What --resume must not change, which run.json notes, and whether a run has been reported."""

import argparse
import hashlib
import json
import os
from pathlib import Path

from qlora_ext.whole_files import write_files

from .data import is_text
from .methods import unread_by
from .output_folder import REPORTS, RUN

# The base, the examples (by what the file holds, wherever it is) and their split, the adapter, the optimizer and its
# schedule.
SAME_RUN = (
    *("model", "method", "seed", "eval_fraction", "max_length", "chat"),
    *("optimizer", "lr", "schedule", "warmup"),
    *("quant_type", "blocksize", "no_double_quant", "skip"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "use_rslora"),
)
NOTED_AS = {
    "data_is_text": "--data: a .txt file",
    "examples": "--data: examples that this version makes of it, to train on + held out",
    "data_sha256": "--data: sha256",
    "examples_of_a_step": "--batch-size * --accumulate",
}


def what_stays(options: argparse.Namespace) -> dict[str, str]:
    """What is noted of a run of these options."""
    same = {name: str(getattr(options, name)) for name in SAME_RUN if name not in unread_by(options.method)}
    # How a step's examples are divided does not matter to it: memory may ask for another batch size.
    same["examples_of_a_step"] = str(options.batch_size * options.accumulate)
    same["data_is_text"] = str(is_text(options.data))
    return {**same, "data_sha256": hashlib.sha256(options.data.read_bytes()).hexdigest()}


def note(output: Path, same: dict[str, str]) -> None:
    """Write run.json."""
    write_files({output / RUN: lambda path: path.write_text(json.dumps(same, indent=2) + "\n")})


def check_same_run(output: Path, same: dict[str, str]) -> None:
    """Raise ValueError at what differs from the run in `output`, as far as that noted it: earlier versions noted
    less."""
    before = {"optimizer": "adamw", "target_parameters": "None", **_noted(output / RUN)}
    for name, value in same.items():
        known = before.get(name, value)
        if known != value and not (name == "model" and os.path.realpath(str(known)) == os.path.realpath(value)):
            option = NOTED_AS.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"--resume: {option}: expected {known!r} as before, got {value!r}")


def _noted(file: Path) -> dict[str, str]:
    try:
        noted = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{file}: expected the options of the run to go on with, got no file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got a damaged file ({error})") from error
    if not isinstance(noted, dict):
        raise ValueError(f"{file}: expected a JSON object of a run's options, got {noted!r:.40}")
    return noted


def is_reported(output: Path) -> bool:
    """Whether a run has saved its product and its reports."""
    return any(output.glob("*.safetensors")) and all((output / name).exists() for name in REPORTS)
