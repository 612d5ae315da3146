"""Whether --resume goes on with the run that it finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
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
    shutil.copytree(arguments["model"], tmp_path / "other")
    assert cli.main(words({**arguments, "model": tmp_path / "other", "resume": True})) == 2
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
