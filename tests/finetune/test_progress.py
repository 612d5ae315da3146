"""What a run shows while it trains, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from tiny_model import one_thread as one_thread
from tiny_training import run

from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune.callbacks import check_finite


def test_an_infinite_loss_is_no_number() -> None:
    with pytest.raises(ValueError, match="the loss is inf at step 3"):
        check_finite(float("inf"), "loss", 3)


class Bar:
    made: ClassVar[list[Bar]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.updates, self.closed = options, 0, 0
        Bar.made.append(self)

    def update(self) -> None:
        self.updates += 1

    def set_postfix(self, **_: Any) -> None: ...

    def close(self) -> None:
        self.closed += 1


def test_the_bar_goes_on_from_the_step_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_ext.finetune.callbacks.tqdm", Bar)
    run(tmp_path, steps=2)
    run(tmp_path, steps=5, resume=True)
    bar = Bar.made[-1]
    assert (bar.options["total"], bar.options["initial"], bar.updates, bar.closed) == (5, 2, 3, 1)


def test_stdout_is_for_the_result_alone_and_stderr_for_held_out_losses(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words({**arguments, "eval-steps": 1, "samples": 0, "method": "lora", "dtype": "fp32"})) == 0
    told = capsys.readouterr()
    assert told.out.startswith("method ")
    assert len(told.out.splitlines()) == 6
    assert all(f"step {step}: held-out loss " in told.err for step in (1, 2))
