"""Where finetune trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words

from qlora_ext import info
from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune import run


@pytest.mark.parametrize(
    ("method", "optimizer", "built", "runs", "device"),
    [
        ("qlora", "adamw", False, False, "cpu"),
        ("lora", "paged_adamw8", False, False, "cpu"),
        ("lora", "adamw", False, False, "cuda"),
        ("qlora", "adamw", True, False, "cpu"),
        ("lora", "adamw", True, False, "cuda"),
        ("qlora", "paged_adamw32", True, True, "cuda"),
    ],
)
def test_a_gpu_is_used_if_what_runs_is_built_for_it(
    method: str,
    optimizer: str,
    built: bool,
    runs: bool,
    device: str,
    arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "built_for_cuda", lambda: built)
    monkeypatch.setattr(run, "runs_on", lambda _: runs)
    monkeypatch.setattr(run, "gpu", lambda: "a GPU")
    options = cli.parser().parse_args(words({**arguments, "method": method, "optimizer": optimizer}))
    assert run._device(options) == torch.device(device)


@pytest.mark.parametrize(
    "name", ["cudaErrorNoKernelImageForDevice", "cudaErrorUnsupportedPtxVersion", "cudaErrorUnknown"]
)
def test_a_gpu_may_need_code_that_the_build_does_not_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> None:
        raise RuntimeError(f"quantize_4bit([64] Float, blocksize 64): {name}")

    runs_on = info.runs_on
    assert runs_on("cpu")
    monkeypatch.setattr(torch.ops.qlora_ext, "quantize_4bit", launch)
    monkeypatch.setattr(info, "built_for_cuda", lambda: True)
    monkeypatch.setattr(info, "runs_on", lambda _: runs_on("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    if name == "cudaErrorUnknown":
        with pytest.raises(RuntimeError, match=name):
            runs_on("cpu")
        assert info.gpu() == f"V100 (sm_70), where an op fails: quantize_4bit([64] Float, blocksize 64): {name}"
    else:
        assert info.gpu() == "V100 (sm_70), for which this build has no code"


def test_several_processes_are_refused(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words(arguments)) == 2
    assert "error: WORLD_SIZE: expected one process, got 2" in capsys.readouterr().err
    assert not arguments["output"].exists()


@pytest.mark.parametrize(("world", "got"), [("", "''"), ("one", "one")])
def test_a_number_of_processes_that_is_none_is_named(
    world: str, got: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert cli.main(words(arguments)) == 2
    assert f"error: WORLD_SIZE: expected one process, got {got}: " in capsys.readouterr().err
