"""Where the states of a run's optimizer were, and what is left of them when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import one_thread as one_thread
from tiny_training import run

from qlora_ext.finetune.optimizer import OptimizerChoice


def in_file(folder: Path) -> OptimizerChoice:
    return OptimizerChoice("paged_adamw32", host_budget=0, page_file=folder / "pages")


def test_states_of_a_run_on_the_cpu_are_in_host_memory(tmp_path: Path) -> None:
    states = run(tmp_path, steps=1)[1].optimizer
    assert states.device_bytes == 0
    assert states.host_bytes > 0


def test_states_that_are_read_from_a_file_are_waited_for_in_whole_pages(tmp_path: Path) -> None:
    states = run(tmp_path / "out", steps=3, optimizer=in_file(tmp_path))[1].optimizer
    assert states.ring_bytes % 2**20 == 0
    assert states.seconds_waited > 0


def test_the_page_file_is_deleted_while_the_error_of_the_run_is_held(tmp_path: Path) -> None:
    """And with the error the optimizer."""
    with pytest.raises(ValueError, match="the loss is") as kept:
        run(tmp_path / "diverged", lr=1e30, optimizer=in_file(tmp_path))
    assert not (tmp_path / "pages").exists()
    assert kept.tb is not None
