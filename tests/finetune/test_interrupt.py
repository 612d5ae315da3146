"""Signals that end a training, and what is saved then."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import one_thread as one_thread
from tiny_training import assert_same_tensors, interrupt_at, run, trained
from tiny_training import python_handles_interrupts as python_handles_interrupts
from torch import Tensor
from transformers import PreTrainedModel

from qlora_ext.finetune import trainer
from qlora_ext.finetune.callbacks import _tell
from qlora_ext.finetune.data import PadToLongest
from qlora_ext.finetune.output_folder import newest_checkpoint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_as_ctrl_c_does(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers of jobs send the one, and a terminal that goes the other."""
    before = signal.getsignal(number)
    interrupt_at(monkeypatch, 6, number)
    _, outcome = run(tmp_path)
    assert outcome.interrupted
    assert newest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{outcome.step}"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_let_the_product_be_saved(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer.save_adapter

    def interrupted(model: PreTrainedModel, folder: Path) -> None:
        if folder == tmp_path:
            signal.raise_signal(number)
        save(model, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_adapter", interrupted)
        model, outcome = run(tmp_path)
    assert (outcome.interrupted, outcome.step) == (True, 8)
    saved = (tmp_path / "adapter_model.safetensors").read_bytes()
    again, outcome = run(tmp_path, resume=True)
    assert (outcome.interrupted, outcome.step) == (False, 8)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == saved
    assert_same_tensors(trained(again), trained(model))


def test_a_run_of_nohup_stays_when_the_terminal_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_at(monkeypatch, 6, signal.SIGHUP)
        assert not run(tmp_path)[1].interrupted
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_interrupt_stops_at_once(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: object) -> dict[str, Tensor]:
        signal.raise_signal(number)
        signal.raise_signal(number)
        raise AssertionError("the second signal must not return")

    monkeypatch.setattr(PadToLongest, "__call__", twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not list(tmp_path.glob("*"))


def test_an_evaluation_that_is_interrupted_is_the_last_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = trainer.held_out_loss

    def interrupted(*args: Any, **options: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "held_out_loss", interrupted)
        _, outcome = run(tmp_path, eval_steps=3)
    assert (outcome.interrupted, outcome.step, [step for step, _ in outcome.held_out]) == (True, 3, [3])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    _, whole = run(tmp_path / "whole", eval_steps=3)
    assert run(tmp_path, eval_steps=3, resume=True)[1].held_out == whole.held_out


def test_stdout_in_a_file_is_written_when_the_terminal_has_gone(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)  # until capfd puts back what was there
    os.close(write)
    _tell(b"interrupted")
    os.write(1, b"the report")
    assert capfd.readouterr().out == "the report"


IN_A_TERMINAL = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.append("finetune")  # of tests/, where this runs
from tiny_training import run
from qlora_ext.finetune.data import PadToLongest
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, whatever runs the tests
collate = PadToLongest.__call__
deadline = time.monotonic() + 120  # of a test that was killed nothing stays
def when_the_terminal_has_gone(self, examples):
    (folder / "begun").touch()
    while not (folder / "gone").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return collate(self, examples)
PadToLongest.__call__ = when_the_terminal_has_gone
_, outcome = run(folder, eval_steps=1)
(folder / "ended").write_text(f"{outcome.interrupted} {outcome.step}")
"""


@pytest.mark.parametrize("first", [None, signal.SIGINT], ids=["", "after-ctrl-c"])
def test_a_terminal_that_goes_takes_no_step_with_it(first: signal.Signals | None, tmp_path: Path) -> None:
    """What is printed fails from then on, be it by the handler of the signal."""
    process, terminal = pty.fork()
    if process == 0:
        try:
            os.chdir(Path(__file__).parents[1])
            os.execv(sys.executable, [sys.executable, "-c", IN_A_TERMINAL, str(tmp_path)])
        finally:
            os._exit(127)
    said, deadline = b"", time.monotonic() + 120

    def read_until(seen: Callable[[], bool]) -> None:
        nonlocal said
        while not seen():
            assert time.monotonic() < deadline, said
            if select.select([terminal], [], [], 0.1)[0]:
                said += os.read(terminal, 4096)

    try:
        read_until((tmp_path / "begun").exists)
        if first is not None:
            os.kill(process, first)
            read_until(lambda: b"interrupted: " in said)
        os.close(terminal)
        (tmp_path / "gone").touch()
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        process = 0
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    assert (tmp_path / "ended").read_text() == "True 1", said
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest / "adapter_model.safetensors").exists()
