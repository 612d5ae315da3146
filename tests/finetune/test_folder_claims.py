"""How a run takes its output folder, beside others and after ones that were killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_model import one_thread as one_thread
from tiny_training import interrupt_at, run
from tiny_training import python_handles_interrupts as python_handles_interrupts

from qlora_ext.finetune import output_folder
from qlora_ext.finetune.output_folder import LOCK, STAGING, OutputFolder
from qlora_ext.whole_files import is_at


def test_folders_above_it_are_made(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "runs" / "first") as output:
        output.begin(resume=False, overwrite=False)
        assert (tmp_path / "runs" / "first").is_dir()


def test_overwriting_that_is_killed_leaves_the_note_of_whose_the_checkpoints_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "run.json").write_text("{}")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path) as output:
        output.begin(resume=False, overwrite=True)
    assert (tmp_path / "run.json").exists()


def test_a_lock_whose_file_another_run_has_just_deleted_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = output_folder.lock, []

    def after_another(file: Any) -> bool:
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        return lock(file)

    monkeypatch.setattr(output_folder, "lock", after_another)
    with OutputFolder(tmp_path) as output:
        assert output.lock is not None
        assert is_at(tmp_path / LOCK, output.lock)


def test_what_a_run_that_was_killed_while_it_saved_has_left_is_no_part_of_a_later_model(tmp_path: Path) -> None:
    run(tmp_path, "full", steps=1)
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / "half").write_text("of a model")
    run(tmp_path, "full", steps=1, resume=True)
    assert not (tmp_path / "half").exists()


def test_a_run_that_is_interrupted_in_its_last_step_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 2)
    assert run(tmp_path, steps=1)[1].interrupted
