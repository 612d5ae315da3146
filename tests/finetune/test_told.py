"""What a run tells of its examples, its product and its page file, and whose answers it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from labelled_data import jsonl
from tiny_model import one_thread as one_thread
from tiny_training import interrupt_at
from tiny_training import python_handles_interrupts as python_handles_interrupts

import qlora_ext
from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune import run


def reported(arguments: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((arguments["output"] / "report.json").read_text(encoding="utf-8"))
    return report


def test_examples_are_counted_before_any_training(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [{"prompt": f"say {i % 10}", "response": "aaaa"} for i in range(12)]
    cut = {"prompt": "q", "response": "a" * 100}
    without_answer = [{"prompt": str(i) + "q" * 100, "response": "a"} for i in range(3)]
    path = jsonl(tmp_path / "d.jsonl", *twice, cut, *without_answer)
    options = {"max-length": 60, "eval-fraction": 0.3, "eval-examples": 1, "steps": 1, "samples": 0}
    assert cli.main(words({**arguments, "data": path, **options})) == 0
    counted = "2 duplicates removed, 4 truncated to 60 tokens, 3 dropped with no answer left"
    assert f"8 examples to train on, 3 held out ({counted})\n" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "product"), [("lora", "adapter"), ("full", "model")])
def test_the_loss_before_and_the_product_are_told(
    method: str, product: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words({**arguments, "method": method, "dtype": "bf16", "steps": 1, "samples": 0})) == 0
    report, told = reported(arguments), capsys.readouterr().err
    assert f"held-out loss before: {report['held_out_loss_before']:.4f}\n" in told
    assert f"step 1 of 1: {product} saved in {arguments['output']}\n" in told
    assert (report["dtype"], report["samples"]) == ("bfloat16", [])
    assert report["attention"] == ("sdpa" if torch.cuda.is_available() else "eager"), "all examples are short"
    assert (report["adapter_bytes"] > 0) == (product == "adapter")


def test_a_run_that_is_ended_tells_the_step_it_came_to(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 4)
    assert cli.main(words({**arguments, "steps": 6, "samples": 0})) == 130
    (checkpoint,) = arguments["output"].glob("checkpoint-*")
    step = checkpoint.name.removeprefix("checkpoint-")
    assert step != "6"
    assert f"step {step} of 6: adapter saved in " in capsys.readouterr().err


def test_a_run_of_epochs_reports_its_steps(arguments: dict[str, Any]) -> None:
    assert cli.main(words({**arguments, "steps": None, "epochs": 0.3, "samples": 0})) == 0
    assert reported(arguments)["step"] == 3  # of 4 examples each, 30% of 27


def test_samples_are_of_the_examples_held_out_before_and_after(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out: list[Any] = []
    shown: list[Any] = []
    load_data = run.load_data

    def load(*args: Any, **options: Any) -> Any:
        data = load_data(*args, **options)
        held_out.extend(data.held_out)
        return data

    def answers(model: Any, tokenizer: Any, examples: Any, **_: Any) -> list[str]:
        shown.append(examples)
        return [f"answer {len(shown)}"] * len(examples)

    monkeypatch.setattr(run, "load_data", load)
    monkeypatch.setattr(run, "sample_answers", answers)
    assert cli.main(words({**arguments, "steps": 1, "samples": 1})) == 0
    assert shown == [held_out[:1]] * 2
    (sample,) = reported(arguments)["samples"]
    assert (sample["before"], sample["after"]) == ("answer 1", "answer 2")


def test_the_adapter_starts_as_the_seed_says(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    add_adapter = qlora_ext.add_adapter
    seeds: list[int] = []

    def add(*given: Any) -> Any:
        seeds.append(torch.initial_seed())
        return add_adapter(*given)

    monkeypatch.setattr(qlora_ext, "add_adapter", add)
    assert cli.main(words({**arguments, "seed": 5, "steps": 1, "samples": 0})) == 0
    assert seeds == [5]


@pytest.mark.parametrize(("budget", "empty"), [(None, True), ("4K", False)], ids=str)
def test_a_page_file_that_stays_empty_is_told(
    budget: str | None, empty: bool, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paged = {"optimizer": "paged_adamw8", "page-file": tmp_path / "pages", "host-budget": budget}
    assert cli.main(words({**arguments, **paged, "steps": 1, "samples": 0})) == 0
    assert ("--page-file: stays empty" in capsys.readouterr().err) == empty
