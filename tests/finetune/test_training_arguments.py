"""What transformers' Trainer is told of a schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import SCHEDULE
from transformers import TrainingArguments

from qlora_ext.finetune.train import _arguments


def told(output: Path, **changes: Any) -> TrainingArguments:
    return _arguments(replace(SCHEDULE, **changes), output, torch.device("cpu"), autocast=False)


def test_a_constant_rate_has_a_warmup(tmp_path: Path) -> None:
    assert told(tmp_path, kind="constant", warmup=5).lr_scheduler_type == "constant_with_warmup"


@pytest.mark.parametrize(("steps", "warmup"), [(100, 1), (10, 0.03)], ids=["1 step", "a share of less than 1 step"])
def test_a_warmup_of_one_step(steps: int, warmup: float, tmp_path: Path) -> None:
    assert told(tmp_path, steps=steps, warmup=warmup).get_warmup_steps(steps) == 1


def test_nothing_is_sent_to_a_service_that_is_installed(tmp_path: Path) -> None:
    assert told(tmp_path).report_to == []
