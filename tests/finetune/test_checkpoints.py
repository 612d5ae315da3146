"""Checkpoints that are not whole, and runs that go on beyond the steps that were meant."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from safetensors.torch import load_file
from tiny_model import one_thread as one_thread
from tiny_training import assert_same_tensors, damage_one_bit, interrupt_at, run, trained
from tiny_training import python_handles_interrupts as python_handles_interrupts

from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune.optimizer import OptimizerChoice
from qlora_ext.finetune.run import _print

PAGED = OptimizerChoice("paged_adamw32")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_all_is_on_the_disk_before_it_takes_its_place(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal may hold the new names before the disk has the bytes: then a power cut would leave empty files."""
    on_disk: set[int] = set()
    replaced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        on_disk.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking_replace(written: Path, path: Path) -> None:
        for part in (written, *written.rglob("*")):
            assert part.stat().st_ino in on_disk, part
        replaced.append(path.name)
        replace(written, path)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", checking_replace)
    run(tmp_path, method=method)
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert weights in replaced
    assert any(name.startswith("checkpoint-") for name in replaced)


def test_a_checkpoint_with_other_bytes_than_were_written_is_refused(tmp_path: Path) -> None:
    """torch.load reads them: it looks at no checksum."""
    _, outcome = run(tmp_path, steps=2, save_steps=2)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        file = tmp_path / "checkpoint-2" / name
        content = file.read_bytes()
        damage_one_bit(file)
        with pytest.raises(ValueError, match=f"{name}: damaged; delete {file.parent}"):
            run(tmp_path, steps=3, resume=True)
        file.write_bytes(content)
    assert len(run(tmp_path, steps=3, resume=True)[1].losses) == len(outcome.losses) + 1


@pytest.mark.parametrize("damage", ["missing", "damaged"])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("optimizer.pt", OptimizerChoice()),
        ("scheduler.pt", OptimizerChoice()),
        ("rng_state.pth", OptimizerChoice()),
        ("scheduler.pt", PAGED),
        ("optimizer.safetensors", PAGED),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_checkpoint_without_a_part_is_refused_and_the_one_before_taken(
    name: str, optimizer: OptimizerChoice, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' Trainer takes a new optimizer, or a new schedule, without a word."""
    whole_model, whole = run(tmp_path / "whole", optimizer=optimizer)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        run(tmp_path / "parts", optimizer=optimizer, save_steps=2)
    newest = tmp_path / "parts" / "checkpoint-5"
    file = newest / name
    content = file.read_bytes()
    file.unlink()
    if damage == "damaged":
        file.write_bytes(content[: len(content) // 2])
    message = f"{name}: .*" if name == "optimizer.safetensors" else f"{name}: {damage}; delete {newest}"
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "parts", optimizer=optimizer, resume=True)
    shutil.rmtree(newest)
    again, outcome = run(tmp_path / "parts", optimizer=optimizer, resume=True)
    assert outcome.losses == whole.losses
    assert_same_tensors(trained(again), trained(whole_model))


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw32"])
def test_more_steps_than_were_meant_are_all_taken(
    optimizer: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The optimizer was saved with the rate of the end of its schedule, 0."""
    arguments |= {"optimizer": optimizer}
    assert cli.main(words(arguments)) == 0
    file = arguments["output"] / "adapter_model.safetensors"
    before = load_file(file)
    assert cli.main(words({**arguments, "steps": 4, "resume": True})) == 0
    assert "3 steps were meant before, now 4: the learning rate goes on as if they had been" in capsys.readouterr().err
    assert any(not torch.equal(tensor, before[key]) for key, tensor in load_file(file).items())


@pytest.mark.parametrize(("warmup", "changes"), [(0.5, True), (2, False), (0, False)])
def test_a_constant_rate_depends_on_the_steps_that_are_meant_if_its_warmup_is_a_share(
    warmup: float, changes: bool, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments |= {"schedule": "constant", "warmup": warmup, "samples": 0}
    assert cli.main(words(arguments)) == 0
    assert cli.main(words({**arguments, "steps": 12, "resume": True})) == 0
    assert ("3 steps were meant before, now 12: the learning rate" in capsys.readouterr().err) == changes
    state = json.loads((arguments["output"] / "checkpoint-12" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert (min(rates[3:]) < rates[2]) == changes


@pytest.mark.parametrize("page_file", ["folder", "file"])
def test_a_page_file_that_is_none_costs_no_earlier_run(
    page_file: str, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("somebody's")
    assert cli.main(words(arguments)) == 0
    before = {path: path.read_bytes() for path in arguments["output"].rglob("*") if path.is_file()}
    paging = {"optimizer": "paged_adamw32", "host-budget": "1M", "page-file": tmp_path / page_file}
    assert cli.main(words({**arguments, **paging, "overwrite": True})) == 2
    assert "page_file" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in arguments["output"].rglob("*") if path.is_file()} == before
    assert (tmp_path / "file").read_text() == "somebody's"


def test_answers_with_letters_that_the_terminal_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    _print("after: \xe9 \N{PARTY POPPER}")
    sys.stdout.flush()
    assert shown.getvalue() == b"after: \xe9 ?\n"
    plain = io.StringIO()  # of no encoding
    monkeypatch.setattr(sys, "stdout", plain)
    _print("\N{PARTY POPPER}")
    assert plain.getvalue() == "\N{PARTY POPPER}\n"
