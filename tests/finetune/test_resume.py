from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from safetensors.torch import load_file, save_file
from tiny_model import one_thread as one_thread
from tiny_model import tiny_tokenizer
from tiny_training import assert_same_tensors, interrupt_at
from tiny_training import python_handles_interrupts as python_handles_interrupts
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from qlora_ext.finetune import __main__ as cli

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 258}
MIXTRAL = MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
GPT_NEOX = GPTNeoXConfig(**SIZES, num_attention_heads=4)
CHANGES: list[dict[str, Any]] = [
    *({"seed": 5}, {"method": "lora"}, {"r": 4}, {"blocksize": 32}, {"optimizer": "paged_adamw32"}),
    *({"lr": 1e-3}, {"schedule": "cosine"}, {"warmup": 2}, {"lora-dropout": 0.5}, {"skip": "q_proj"}),
    *({"lora-alpha": 3}, {"use-rslora": True}, {"target-modules": "q_proj"}, {"quant-type": "fp4"}),
    *({"no-double-quant": True}, {"eval-fraction": 0.2}, {"max-length": 40}, {"chat": "plain"}),
]


@pytest.mark.parametrize("config", [MIXTRAL, GPT_NEOX], ids=lambda config: config.model_type)
def test_a_model_that_its_file_names_otherwise_resumes(
    config: PreTrainedConfig, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' Trainer finds neither experts nor head in its own checkpoint, and goes on with the first ones."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments |= {"model": tmp_path / "model", "method": "full", "dtype": "fp32", "steps": 6}
    assert cli.main(words({**arguments, "output": tmp_path / "whole"})) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert cli.main(words(arguments)) == 130
    assert [path.name for path in arguments["output"].glob("checkpoint-*")] == ["checkpoint-4"]
    assert cli.main(words({**arguments, "resume": True})) == 0
    got, whole = (load_file(folder / "model.safetensors") for folder in (arguments["output"], tmp_path / "whole"))
    assert_same_tensors(got, whole)


def test_a_mixture_trains_to_the_same_bytes(arguments: dict[str, Any], tmp_path: Path) -> None:
    """On several threads, in fp32, torch adds what a token's experts say to its gradient in any order."""
    sizes = {**SIZES, "hidden_size": 128, "moe_intermediate_size": 64}
    experts = {"num_experts": 8, "num_experts_per_tok": 4}  # a sum of two is the same in any order
    config = Qwen3MoeConfig(**sizes, **experts, num_attention_heads=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i * i}, " for i in range(900)))
    arguments |= {"model": tmp_path / "model", "data": tmp_path / "text.txt", "dtype": "fp32", "max-length": 256}
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for output in ("one", "other"):
            assert cli.main(words({**arguments, "output": tmp_path / output})) == 0
    finally:
        torch.set_num_threads(threads)
    one, other = (load_file(tmp_path / output / "adapter_model.safetensors") for output in ("one", "other"))
    assert_same_tensors(one, other)
    assert not torch.are_deterministic_algorithms_enabled()


def test_resume_keeps_the_examples_of_a_step(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else steps of the one size would count as steps of the other, and examples be left out or learned twice."""
    arguments |= {"method": "lora", "dtype": "fp32", "schedule": "constant", "warmup": 0}
    assert cli.main(words(arguments)) == 0
    for change in ({"batch-size": 8}, {"accumulate": 2}):
        assert cli.main(words({**arguments, **change, "steps": 6, "resume": True})) == 2
        assert (
            "error: --resume: --batch-size * --accumulate: expected '4' as before, got '8'" in capsys.readouterr().err
        )
    divided = {**arguments, "batch-size": 2, "accumulate": 2, "steps": 9}  # over the end of an epoch of 7 steps
    assert cli.main(words({**divided, "resume": True})) == 0
    assert cli.main(words({**arguments, "steps": 9, "output": tmp_path / "whole"})) == 0
    got, whole = (
        json.loads((folder / "report.json").read_text()) for folder in (arguments["output"], tmp_path / "whole")
    )
    assert got["losses"] == pytest.approx(whole["losses"], rel=1e-4)


def test_resume_refuses_another_run(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(arguments)) == 0
    before = (arguments["output"] / "run.json").read_bytes()
    for change in CHANGES:
        assert cli.main(words({**arguments, **change, "steps": 6, "resume": True})) == 2
        last_line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"--{next(iter(change))}: expected" in last_line
        assert (arguments["output"] / "run.json").read_bytes() == before
        assert not (arguments["output"] / "checkpoint-6").exists()


def test_resume_knows_data_by_what_it_holds_and_a_model_by_where_it_is(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = arguments["data"].read_text().splitlines(keepends=True)
    assert cli.main(words(arguments)) == 0
    arguments |= {"data": tmp_path / "copy.jsonl", "steps": 6, "resume": True}
    arguments["data"].write_text("".join(lines[:20]))
    assert cli.main(words(arguments)) == 2
    assert "error: --resume: --data: sha256: expected '" in capsys.readouterr().err
    as_text = tmp_path / "copy.txt"
    as_text.write_text("".join(lines))
    assert cli.main(words({**arguments, "data": as_text})) == 2
    assert "error: --resume: --data: a .txt file: expected 'False' as before" in capsys.readouterr().err
    arguments["data"].write_text("".join(lines))
    monkeypatch.chdir(arguments["model"].parent)
    assert cli.main(words({**arguments, "model": f"./{arguments['model'].name}"})) == 0


def test_resume_of_a_finished_run_leaves_its_report(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(arguments)) == 0
    report = arguments["output"] / "report.json"
    before = report.read_bytes()
    assert cli.main(words({**arguments, "resume": True})) == 0
    assert "step 3 of 3 was done before" in capsys.readouterr().err
    assert cli.main(words({**arguments, "steps": 2, "resume": True})) == 2
    assert "--steps: expected at least the 3 that are done, got 2" in capsys.readouterr().err
    assert report.read_bytes() == before
    for name in ("report.json", "report.png", "adapter_model.safetensors"):  # as when a run ends after the last step
        (arguments["output"] / name).unlink()
        assert cli.main(words({**arguments, "resume": True})) == 0
        assert (arguments["output"] / name).exists()
    unseen = json.loads(report.read_text())
    assert unseen["gradient_bytes"] is unseen["optimizer_bytes"] is unseen["optimizer"]["host_bytes"] is None


def test_what_replaces_a_run_is_not_resumed_from_it(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert cli.main(words(arguments)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("qlora_ext.finetune.run.train", interrupted)
        assert cli.main(words({**arguments, "seed": 1, "overwrite": True})) == 130
    with pytest.raises(SystemExit, match="2"):
        cli.main(words({**arguments, "seed": 1, "resume": True}))
    assert "--resume: no checkpoint" in capsys.readouterr().err


def test_a_run_that_noted_less_resumes(arguments: dict[str, Any]) -> None:
    assert cli.main(words(arguments)) == 0
    file = arguments["output"] / "run.json"
    noted = json.loads(file.read_text())
    for name in ("optimizer", "lr", "data_sha256", "examples"):  # of versions that had no choice, or did not look
        del noted[name]
    file.write_text(json.dumps(noted))
    assert cli.main(words({**arguments, "steps": 4, "resume": True})) == 0
    assert set(noted) < set(json.loads(file.read_text()))


def test_a_version_that_makes_other_examples_of_the_data_does_not_go_on(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(arguments)) == 0
    file = arguments["output"] / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"examples": "40 + 4"}))
    assert cli.main(words({**arguments, "steps": 4, "resume": True})) == 2
    assert "--data: examples that this version makes of it, to train on + held out: expected '40 + 4'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("content", ["{bad", "[]", None])
def test_damaged_note_of_the_run_is_named(
    content: str | None, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (arguments["output"] / "checkpoint-3").mkdir(parents=True)
    file = arguments["output"] / "run.json"
    if content is not None:
        file.write_text(content)
    assert cli.main(words({**arguments, "resume": True})) == 2
    assert f"error: {file}: expected " in capsys.readouterr().err


def test_foreign_adapter_in_the_checkpoint_is_named(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(arguments)) == 0
    adapter = arguments["output"] / "checkpoint-3" / "adapter_model.safetensors"
    save_file({name: tensor[:1].clone() for name, tensor in load_file(adapter).items()}, adapter)
    assert cli.main(words({**arguments, "steps": 6, "resume": True})) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith(f"error: load_adapter: {adapter}: ")
    assert "expected shape" in last_line


def test_more_steps_than_were_meant_change_no_constant_rate(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments |= {"schedule": "constant", "samples": 0}
    assert cli.main(words(arguments)) == 0
    assert cli.main(words({**arguments, "steps": 4, "resume": True})) == 0
    assert "were meant before" not in capsys.readouterr().err


def test_ctrl_c_saves_and_resume_ends_as_an_uninterrupted_run(arguments: dict[str, Any], tmp_path: Path) -> None:
    arguments |= {"steps": 150, "lora-dropout": 0.1}
    command = [sys.executable, "-m", "qlora_ext.finetune", *words({**arguments, "save-steps": 10})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1) as child:
        deadline = time.monotonic() + 300
        while not list(arguments["output"].glob("checkpoint-*")):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=300)
    assert child.returncode == 130, err
    assert "with --resume goes on from here" in err
    assert "Traceback" not in err
    assert (arguments["output"] / "adapter_model.safetensors").exists()
    assert not (arguments["output"] / "report.json").exists()

    assert cli.main(words({**arguments, "resume": True})) == 0
    resumed = json.loads((arguments["output"] / "report.json").read_text())
    assert resumed["tokens"] > 0
    arguments["output"] = tmp_path / "whole"
    assert cli.main(words(arguments)) == 0
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert resumed["tokens"] < whole["tokens"]
    assert resumed["held_out_loss_after"] == pytest.approx(whole["held_out_loss_after"], abs=1e-6)
