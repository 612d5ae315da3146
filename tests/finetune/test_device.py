"""Where finetune trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words

from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune import run


@pytest.mark.parametrize(
    ("method", "optimizer", "built", "device"),
    [
        ("qlora", "adamw", False, "cpu"),
        ("lora", "paged_adamw8", False, "cpu"),
        ("lora", "adamw", False, "cuda"),
        ("qlora", "paged_adamw32", True, "cuda"),
    ],
)
def test_a_gpu_is_used_if_what_runs_is_built_for_it(
    method: str, optimizer: str, built: bool, device: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "built_for_cuda", lambda: built)
    options = cli.parser().parse_args(words({**arguments, "method": method, "optimizer": optimizer}))
    assert run._device(options) == torch.device(device)


def test_several_processes_are_refused(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words(arguments)) == 2
    assert "error: WORLD_SIZE: expected one process, got 2" in capsys.readouterr().err
    assert not arguments["output"].exists()
