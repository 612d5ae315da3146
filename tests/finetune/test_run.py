"""Whole runs of the command: what it decides of its options, its data and its model, and hands on."""

from __future__ import annotations

import inspect
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
from labelled_data import load as load_examples
from tiny_model import one_thread as one_thread
from tiny_model import tiny_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune import run


def reported(arguments: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((arguments["output"] / "report.json").read_text(encoding="utf-8"))
    return report


def handed_on(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The list of what each call of this function of a run will be given under this name."""
    original = getattr(run, name)
    given: list[Any] = []

    def spy(*args: Any, **options: Any) -> Any:
        given.append(inspect.signature(original).bind(*args, **options).arguments.get(option))
        return original(*args, **options)

    monkeypatch.setattr(run, name, spy)
    return given


def test_attention_suits_the_longest_example_that_is_held_out_too(arguments: dict[str, Any], tmp_path: Path) -> None:
    records = [{"prompt": f"say {i}" + "x" * (200 * (i == 3)), "response": "aaaa"} for i in range(6)]
    path = jsonl(tmp_path / "d.jsonl", *records)

    def longest_to_train_on(seed: int) -> int:
        return max(len(example.input_ids) for example in load_examples(path, tiny_tokenizer(), seed=seed).train)

    seed = next(seed for seed in range(40) if longest_to_train_on(seed) <= 128)
    assert cli.main(words({**arguments, "data": path, "seed": seed, "dtype": "bf16", "steps": 1, "samples": 0})) == 0
    assert reported(arguments)["attention"] == "sdpa"


def test_a_head_that_no_chunk_suits_is_refused_before_training(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 258}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    assert cli.main(words({**arguments, "model": tmp_path / "gemma", "loss-chunk": 4})) == 2
    assert "error: --loss-chunk: Gemma2ForCausalLM: expected the result of lm_head" in capsys.readouterr().err


def test_full_fine_tuning_in_bfloat16_computes_in_it_everywhere(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"train": 1, "held_out_loss": 2, "sample_answers": 2}  # before and after
    given = {name: handed_on(name, "autocast", monkeypatch) for name in calls}
    assert cli.main(words({**arguments, "method": "full", "dtype": "bf16", "steps": 1})) == 0
    assert given == {name: [True] * times for name, times in calls.items()}


def test_held_out_losses_are_by_the_chunks_of_training(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = handed_on("held_out_loss", "chunk", monkeypatch)
    assert cli.main(words({**arguments, "loss-chunk": 5, "steps": 1, "samples": 0})) == 0
    assert given == [5, 5]


def test_without_eval_steps_there_is_no_evaluation_in_between(arguments: dict[str, Any]) -> None:
    assert run._schedule(cli.parser().parse_args(words(arguments)), 3, None).eval_steps == 0


def test_report_counts_what_became_of_the_examples_and_stderr_names_what_is_not_read(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [{"prompt": f"say {i % 10}", "response": "aaaa"} for i in range(12)]
    cut = {"prompt": "q", "response": "a" * 100, "id": 7}
    alike_when_cut = [{"prompt": "q" * 100 + str(i), "response": "a"} for i in range(2)]
    without_answer = [{"prompt": str(i) + "q" * 100, "response": "a"} for i in range(3)]
    path = jsonl(tmp_path / "d.jsonl", *twice, cut, *alike_when_cut, *without_answer)
    assert cli.main(words({**arguments, "data": path, "max-length": 60, "steps": 1, "samples": 0})) == 0
    examples = reported(arguments)["examples"]
    assert (examples["duplicates"], examples["truncated"], examples["dropped"]) == (3, 5, 4)
    assert f"{path}: fields that are not read: id\n" in capsys.readouterr().err


def test_torch_fills_memory_after_a_run_as_before_it(arguments: dict[str, Any]) -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    assert cli.main(words({**arguments, "steps": 1, "samples": 0})) == 0
    assert torch.utils.deterministic.fill_uninitialized_memory is before


def test_adapter_names_a_model_of_the_hub_as_the_hub_does(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(arguments["model"])
    monkeypatch.setattr("qlora_ext.finetune.load.snapshot_download", lambda *_, **__: folder)
    assert cli.main(words({**arguments, "model": "someone/tiny", "steps": 1, "samples": 0})) == 0
    config = json.loads((arguments["output"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
