"""The options of the command line, and its mistakes as one line."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words

from qlora_ext.finetune import __main__ as cli

DEFAULTS: dict[str, Any] = {
    **{"epochs": 1.0, "batch_size": 8, "accumulate": 1, "lr": 2e-4, "schedule": "linear", "warmup": 0.03},
    **{"dtype": "auto", "seed": 0, "save_steps": 100, "optimizer": "adamw", "max_length": 512, "chat": "auto"},
    **{"eval_fraction": 0.1, "samples": 3, "quant_type": "nf4", "blocksize": 64},
}


def test_defaults(arguments: dict[str, Any]) -> None:
    required = {name: arguments[name] for name in ("model", "data", "method", "output")}
    options = vars(cli.parser().parse_args(words(required)))
    assert {name: options[name] for name in DEFAULTS} == DEFAULTS


def test_full_fine_tuning_reads_no_option_of_an_adapter_or_of_4_bits(arguments: dict[str, Any]) -> None:
    given = {"r": 4, "lora-alpha": 3, "lora-dropout": 0.5, "target-modules": "q_proj", "use-rslora": True}
    given |= {"quant-type": "fp4", "blocksize": 32, "no-double-quant": True, "skip": "o_proj"}
    command = cli.parser()
    options = command.parse_args(words({**arguments, "method": "full", **given}))
    assert cli._unread(command, options) == [f"--{name}" for name in given]


def test_bytes_have_units() -> None:
    assert [cli._size(text) for text in ("5", "2K", "512M", "2G", "1T")] == [5, 2 << 10, 512 << 20, 2 << 30, 1 << 40]
    with pytest.raises(argparse.ArgumentTypeError, match="expected bytes"):
        cli._size("8388608T")


@pytest.mark.parametrize("option", [("warmup", "inf"), ("lr", 0), ("epochs", 0), ("eval-examples", 0)], ids=str)
def test_numbers_out_of_range_are_named(
    option: tuple[str, Any], arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = option
    with pytest.raises(SystemExit, match="2"):
        cli.parser().parse_args(words({**arguments, "steps": None, name: value}))
    assert f"argument --{name}: expected a" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["own", "link", "."])
def test_output_holds_no_model_that_is_read_however_it_is_named(
    output: str,
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(arguments["model"], tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("own")
    with pytest.raises(SystemExit, match="2"):
        cli.main(words({**arguments, "model": tmp_path / "own", "output": output, "overwrite": True}))
    assert "expected a folder that does not hold --model" in capsys.readouterr().err
    assert (tmp_path / "own" / "model.safetensors").exists()


def test_a_missing_module_of_our_own_is_no_mistake_of_the_command(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qlora_ext.finetune.run", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(words(arguments))


@pytest.mark.parametrize("error", [TypeError("a\nb"), OSError("a\n  b")], ids=["TypeError", "OSError"])
def test_an_error_of_many_lines_is_told_in_one(
    error: Exception, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr("qlora_ext.finetune.run.run", fail)
    assert cli.main(words(arguments)) == 2
    assert capsys.readouterr().err == "error: a b\n"
