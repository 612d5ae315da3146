"""Fine-tuning with the paged optimizer: its checkpoints, its report, its page file."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_model import one_thread as one_thread
from tiny_training import assert_same_tensors, interrupt_at, run, trained
from tiny_training import python_handles_interrupts as python_handles_interrupts

from qlora_ext import PagedAdamW
from qlora_ext.finetune.data import PadToLongest
from qlora_ext.finetune.optimizer import STATE_BITS, OptimizerChoice
from qlora_ext.finetune.output_folder import newest_checkpoint
from qlora_ext.finetune.trainer import PAGED_STATES

PAGE = 2**20  # the default


def in_file(kind: str, folder: Path) -> OptimizerChoice:
    """All states in a page file."""
    return OptimizerChoice(kind, host_budget=0, page_file=folder / "pages")


@pytest.mark.parametrize("kind", STATE_BITS)
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_same_run_wherever_the_states_are(tmp_path: Path, method: str, kind: str) -> None:
    in_memory_model, in_memory = run(tmp_path / "memory", method, optimizer=OptimizerChoice(kind))
    model, outcome = run(tmp_path / "file", method, optimizer=in_file(kind, tmp_path))
    assert outcome.losses == in_memory.losses
    assert_same_tensors(trained(model), trained(in_memory_model))

    fits, streams = in_memory.optimizer, outcome.optimizer
    assert (fits.host_bytes, fits.file_bytes, fits.moved_bytes, fits.hit_rate) == (PAGE, 0, 0, 1.0)
    assert (streams.host_bytes, streams.file_bytes, streams.hit_rate) == (0, PAGE, 0.0)
    assert fits.state_bytes == streams.state_bytes == PAGE
    assert streams.ring_bytes >= 1
    # Out in each of the 8 steps; in for each but the first, and for the checkpoint.
    assert streams.moved_bytes == (8 + 7 + 1) * PAGE


def test_paged_adamw_trains_as_torchs_does(tmp_path: Path) -> None:
    _, theirs = run(tmp_path / "theirs")
    _, ours = run(tmp_path / "ours", optimizer=OptimizerChoice("paged_adamw32"))
    _, ours_in_8_bits = run(tmp_path / "8 bits", "full", optimizer=OptimizerChoice("paged_adamw8"))
    _, theirs_full = run(tmp_path / "full", "full")
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours_in_8_bits.losses == pytest.approx(theirs_full.losses, rel=1e-2)
    assert ours_in_8_bits.losses != pytest.approx(theirs_full.losses, rel=1e-6), "its states have fewer bits"


@pytest.mark.parametrize("kind", STATE_BITS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_model, whole = run(tmp_path / "whole", method, optimizer=OptimizerChoice(kind))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        _, first = run(tmp_path / "parts", method, optimizer=in_file(kind, tmp_path))
    assert first.interrupted
    assert not (tmp_path / "pages").exists()
    checkpoint = newest_checkpoint(tmp_path / "parts")
    assert checkpoint is not None
    assert (checkpoint / PAGED_STATES).exists()
    assert not (checkpoint / "optimizer.pt").exists(), "which would have been a copy of all states in memory"

    # Budgets may change: they change no result.
    model, second = run(tmp_path / "parts", method, resume=True, optimizer=OptimizerChoice(kind))
    assert second.losses == whole.losses
    assert_same_tensors(trained(model), trained(whole_model))
    again_model, again = run(tmp_path / "parts", method, resume=True, optimizer=in_file(kind, tmp_path))
    assert (again.step, again.tokens, again.losses) == (8, 0, whole.losses)
    assert_same_tensors(trained(again_model), trained(whole_model))


def test_resumed_in_the_file_equals_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_model, _ = run(tmp_path / "whole", optimizer=OptimizerChoice("paged_adamw32"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        run(tmp_path / "parts", optimizer=OptimizerChoice("paged_adamw32"))
    model, _ = run(tmp_path / "parts", resume=True, optimizer=in_file("paged_adamw32", tmp_path))
    assert_same_tensors(trained(model), trained(whole_model))
    assert not (tmp_path / "pages").exists()


def test_page_file_is_deleted_however_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = in_file("paged_adamw32", tmp_path)
    with pytest.raises(ValueError, match="the loss is"):
        run(tmp_path / "diverged", lr=1e30, optimizer=choice)
    assert not (tmp_path / "pages").exists()

    def twice(*_: object) -> None:
        assert (tmp_path / "pages").exists()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(PadToLongest, "__call__", twice)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", optimizer=choice)
    assert not (tmp_path / "pages").exists()


def test_foreign_page_file_stays(tmp_path: Path) -> None:
    (tmp_path / "pages").write_text("somebody's")
    with pytest.raises(ValueError, match="page_file: expected a new file"):
        run(tmp_path / "out", optimizer=in_file("paged_adamw32", tmp_path))
    assert (tmp_path / "pages").read_text() == "somebody's"


def test_device_budget_reaches_the_optimizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device_budget: expected None for states on the CPU"):
        run(tmp_path, optimizer=OptimizerChoice("paged_adamw32", device_budget=0))


def test_save_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(PagedAdamW, "save_states", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, save_steps=2, optimizer=OptimizerChoice("paged_adamw8"))
    assert newest_checkpoint(tmp_path) is None


def test_states_cut_short_are_named(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"save_steps": 2, "optimizer": OptimizerChoice("paged_adamw32")}
    run(tmp_path, steps=2, **changes)
    states = tmp_path / "checkpoint-2" / PAGED_STATES
    states.write_bytes(states.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"checkpoint-2.*{PAGED_STATES}"):
        run(tmp_path, steps=4, resume=True, **changes)
