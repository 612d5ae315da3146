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
from tiny_model import one_thread as one_thread

from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune.optimizer import KINDS

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


NUMBERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("-1", "4294967296", "1.5"), ("seed", "a whole number from 0 to 4294967295")),
    **dict.fromkeys(("1e38", "1e300"), ("lr", "1e37 at most")),
}


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_that_training_would_fail_at_are_named_before(
    value: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name, wanted = NUMBERS[value]
    with pytest.raises(SystemExit, match="2"):
        cli.main(words({**arguments, name: value}))
    assert f"error: argument --{name}: expected {wanted}, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", KINDS)
def test_the_largest_rate_and_seed_train_until_the_loss_is_no_number(
    optimizer: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    largest = {"lr": "1e37", "seed": (1 << 32) - 1, "warmup": 0, "samples": 0, "optimizer": optimizer}
    assert cli.main(words({**arguments, **largest})) == 2
    assert ": try a lower learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["data", "model", "page-file"])
def test_a_name_that_is_too_long_is_named(
    option: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{'x' * 300}/pages"
    with pytest.raises(SystemExit, match="2"):
        cli.main(words({**arguments, "optimizer": "paged_adamw8", option: name}))
    assert f"error: --{option} {name}: " in capsys.readouterr().err.splitlines()[-1]


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
