"""Training runs of the tiny model, in a second each, and Ctrl-C in the middle of one."""

from __future__ import annotations

import signal
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, set_seed

import qlora_ext
from qlora_ext.finetune.data import Dataset, PadToLongest
from qlora_ext.finetune.encode import IGNORE, Example
from qlora_ext.finetune.optimizer import OptimizerChoice
from qlora_ext.finetune.train import Outcome, Schedule, resumable, train

TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """As in a terminal; what a shell runs in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def example(index: int) -> Example:
    prompt = [(7 * index + 3 * position) % 250 for position in range(3)]
    answer = list(range(40, 43 + index % 5))
    return Example(prompt + answer, [IGNORE] * 3 + answer, 3, "")


def damage_one_bit(file: Path) -> None:
    """In the midst of the largest part of a file of torch.save."""
    with zipfile.ZipFile(file) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    content = bytearray(file.read_bytes())
    name, extra = (int.from_bytes(content[part.header_offset + at :][:2], "little") for at in (26, 28))
    content[part.header_offset + 30 + name + extra + part.file_size // 2] ^= 1
    file.write_bytes(content)


DATA = Dataset([example(i) for i in range(21)], [example(i) for i in range(30, 35)], 0, 0, 0)
SCHEDULE = Schedule(
    steps=8,  # an epoch is 6 steps, the last short
    batch_size=2,
    accumulate=2,
    lr=1e-2,
    kind="linear",
    warmup=0.03,
    eval_steps=0,
    save_steps=100,
    seed=0,
    gradient_checkpointing=False,
    loss_chunk=None,
    optimizer=OptimizerChoice(),
)


def build(method: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    if method == "full":
        return model
    if method == "qlora":
        qlora_ext.quantize_model(model)
    qlora_ext.add_adapter(model, qlora_ext.LoraConfig(r=4, lora_dropout=0.2))
    return model


def run(output: Path, method: str = "lora", resume: bool = False, **changes: Any) -> tuple[LlamaForCausalLM, Outcome]:
    model = build(method)
    set_seed(123)  # a run must not depend on what happened before it
    schedule = replace(SCHEDULE, **changes)
    before = resumable(output, schedule) if resume else None
    return model, train(model, TOKENIZER, DATA, schedule, output, adapter=method != "full", resume=before)


def trained(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=name)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, number: signal.Signals = signal.SIGINT) -> None:
    """Raise a signal while the `call`-th batch is being made, as Ctrl-C in the middle of a step would."""
    collate, calls = PadToLongest.__call__, [0]

    def counting(self: PadToLongest, examples: Sequence[Example]) -> dict[str, Tensor]:
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(number)
        return collate(self, examples)

    monkeypatch.setattr(PadToLongest, "__call__", counting)
