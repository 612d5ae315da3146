"""What transformers' Trainer is told of a schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import DATA, SCHEDULE, TOKENIZER, build
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from qlora_ext.finetune.train import _arguments, has_other_rates, train


def told(output: Path, **changes: Any) -> TrainingArguments:
    return _arguments(replace(SCHEDULE, **changes), output, torch.device("cpu"), autocast=False)


def test_a_constant_rate_has_a_warmup(tmp_path: Path) -> None:
    assert told(tmp_path, kind="constant", warmup=5).lr_scheduler_type == "constant_with_warmup"


@pytest.mark.parametrize(("steps", "warmup"), [(100, 1), (10, 0.03)], ids=["1 step", "a share of less than 1 step"])
def test_a_warmup_of_one_step(steps: int, warmup: float, tmp_path: Path) -> None:
    assert told(tmp_path, steps=steps, warmup=warmup).get_warmup_steps(steps) == 1


@pytest.mark.parametrize(
    ("warmup", "done", "meant", "other"),
    [(0.5, 7, 20, True), (0.5, 3, 4, True), (0.5, 7, 12, False), (5, 3, 20, False), (0.5, 3, 10, False)],
    ids=["it was longer", "it is longer", "both are over", "it is in steps", "as meant"],
)
def test_a_constant_rate_is_another_while_the_warmup_is(warmup: float, done: int, meant: int, other: bool) -> None:
    schedule = replace(SCHEDULE, kind="constant", warmup=warmup, steps=10)
    assert has_other_rates(schedule, TrainerState(global_step=done, max_steps=meant)) == other


def test_nothing_is_sent_to_a_service_that_is_installed(tmp_path: Path) -> None:
    assert told(tmp_path).report_to == []


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("launched", ["no", "fp16", "bf16"])
def test_a_run_computes_in_its_own_precision_however_it_is_launched(
    launched: str, autocast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` says in an environment variable what it was told or configured to."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    model = build("full")
    hidden: set[torch.dtype] = set()

    def look(_module: object, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        hidden.add(output.dtype)

    model.model.layers[0].mlp.up_proj.register_forward_hook(look)
    train(model, TOKENIZER, DATA, replace(SCHEDULE, steps=1), tmp_path, adapter=False, autocast=autocast)
    assert hidden == {torch.bfloat16 if autocast else torch.float32}
