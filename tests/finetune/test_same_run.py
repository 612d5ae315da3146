"""Whether --resume goes on with the run that it finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from tiny_model import one_thread as one_thread

from qlora_ext.finetune import __main__ as cli


def test_a_copy_of_the_model_is_another_model(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words({**arguments, "steps": 1})) == 0
    copy = tmp_path / "elsewhere" / arguments["model"].name
    shutil.copytree(arguments["model"], copy)
    assert cli.main(words({**arguments, "model": copy, "resume": True})) == 2
    assert "error: --resume: --model: expected" in capsys.readouterr().err


def test_what_is_known_to_differ_costs_no_minutes_of_reading(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(words({**arguments, "steps": 1})) == 0
    monkeypatch.setattr("qlora_ext.finetune.run.open_checkpoint", lambda _: pytest.fail("opened"))
    assert cli.main(words({**arguments, "seed": 3, "resume": True})) == 2


def test_a_run_that_noted_no_optimizer_was_of_adamw(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """As earlier versions' do not."""
    assert cli.main(words({**arguments, "steps": 1, "samples": 0})) == 0
    file = arguments["output"] / "run.json"
    noted = json.loads(file.read_text())
    assert noted.pop("optimizer") == "adamw"
    file.write_text(json.dumps(noted))
    assert cli.main(words({**arguments, "optimizer": "paged_adamw32", "resume": True})) == 2
    assert "--resume: --optimizer: expected 'adamw' as before, got 'paged_adamw32'" in capsys.readouterr().err


def test_examples_held_out_count_apart(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words({**arguments, "steps": 1, "samples": 0})) == 0
    file = arguments["output"] / "run.json"
    noted = json.loads(file.read_text())
    assert noted["examples"] == "27 + 3"
    file.write_text(json.dumps(noted | {"examples": "27 + 4"}))
    assert cli.main(words({**arguments, "steps": 4, "resume": True})) == 2
    assert "--data: examples that this version makes of it, to train on + held out" in capsys.readouterr().err


def test_a_run_goes_on_in_the_dtype_that_it_began_in(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments |= {"method": "lora", "samples": 0}
    assert cli.main(words({**arguments, "steps": 1, "dtype": "bf16"})) == 0
    file = arguments["output"] / "run.json"
    noted = json.loads(file.read_text())
    assert noted["dtype"] == "bf16"
    for bf16_here, dtype, expected in ((True, "fp32", 2), (False, "auto", 2), (True, "auto", 0), (False, "bf16", 0)):
        monkeypatch.setattr("qlora_ext.finetune.load._C.cpu_paths", lambda here=bf16_here: ["avx512_bf16"] * here)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, here=bf16_here: here)
        assert cli.main(words({**arguments, "dtype": dtype, "resume": True})) == expected
        if expected:
            assert "--resume: --dtype: expected 'bf16' as before, got 'fp32'" in capsys.readouterr().err
    del noted["dtype"]  # as of earlier versions
    file.write_text(json.dumps(noted))
    assert cli.main(words({**arguments, "steps": 4, "dtype": "fp32", "resume": True})) == 0
    assert json.loads(file.read_text())["dtype"] == "fp32"
