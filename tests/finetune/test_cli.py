from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from tiny_model import one_thread as one_thread
from tiny_training import SCHEDULE
from transformers import LlamaForCausalLM

import qlora_ext
from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune import run
from qlora_ext.finetune.load import load_model, open_checkpoint
from qlora_ext.finetune.optimizer import OptimizerChoice
from qlora_ext.finetune.train import CHECKPOINTING, Schedule, _arguments

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_run_from_data_to_report(method: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words({**arguments, "method": method, "steps": 20, "eval-steps": 10})) == 0
    output: Path = arguments["output"]
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    table = capsys.readouterr().out
    assert method in table.splitlines()[1]
    assert f"{report['held_out_loss_before']:.3f} -> {report['held_out_loss_after']:.3f}" in table

    assert report["held_out_loss_after"] < report["held_out_loss_before"]
    assert [step for step, _ in report["held_out_losses"]] == [10, 20]
    assert len(report["losses"]) == report["step"] == report["arguments"]["steps"] == 20
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["step_seconds"])
    assert [(sample["reference"], sample["prompt"][:4]) for sample in report["samples"]] == [("aaaa", "say ")] * 2
    assert report["examples"] == {"train": 27, "held_out": 2, "duplicates": 0, "truncated": 0, "dropped": 0}
    assert report["environment"]["torch"] == torch.__version__
    assert (output / "report.png").stat().st_size > 1000
    assert (output / "adapter_model.safetensors").exists() == (method != "full")
    assert (output / "model.safetensors").exists() == (method == "full")
    assert report["loss_chunk"] == (None if method == "full" else 1024 if torch.cuda.is_available() else 256)
    lowest, highest = {"qlora": (4.12, 4.16), "lora": (16, 32), "full": (32, 32)}[method]
    assert lowest <= report["base_bits"] <= highest


@pytest.mark.parametrize(("method", "unread"), [("full", "--r, --skip"), ("lora", "--skip"), ("qlora", "")])
def test_what_a_method_does_not_read(
    method: str, unread: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words({**arguments, "method": method, "steps": 1, "r": 4, "skip": "o_proj"})) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "does not read" in line]
    assert said == [f"--method {method} does not read {unread}"] * bool(unread)
    run_json = arguments["output"] / "run.json"  # as earlier versions wrote it
    run_json.write_text(json.dumps(json.loads(run_json.read_text()) | {"skip": "q_proj"}))
    read = {} if method == "full" else {"r": 4}
    assert cli.main(words({**arguments, "method": method, "steps": 1, **read, "resume": True})) == (2, 0)[bool(unread)]


def test_every_option_arrives(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, dict[str, Any]] = {}

    def spy(name: str) -> None:
        original = getattr(run, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            given[name] = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
            return original(*args, **kwargs)

        monkeypatch.setattr(run, name, called)

    for name in ("load_data", "load_model", "train", "held_out_loss"):
        spy(name)
    of_data = {"max-length": 40, "eval-fraction": 0.2, "chat": "plain", "seed": 7, "eval-examples": 3}
    of_base = {"quant-type": "fp4", "blocksize": 32, "no-double-quant": True, "skip": "down_proj", "dtype": "fp32"}
    of_adapter = {"r": 3, "lora-alpha": 7, "lora-dropout": 0.25, "use-rslora": True, "target-modules": "q_proj,v_proj"}
    of_run = {"steps": None, "epochs": 0.5, "batch-size": 3, "accumulate": 2, "lr": 3e-3, "schedule": "cosine"}
    of_run |= {"warmup": 2, "eval-steps": 1, "save-steps": 2, "gradient-checkpointing": True, "loss-chunk": 5}
    of_run |= {"attention": "eager", "optimizer": "paged_adamw8", "host-budget": "1M"}
    of_run["page-file"] = arguments["output"].parent / "pages"
    assert cli.main(words({**arguments, **of_data, **of_base, **of_adapter, **of_run})) == 0
    elsewhere = {"help", "resume", "overwrite", "compile", "device-budget", "target-parameters"}
    options = {max(action.option_strings, key=len).removeprefix("--") for action in cli.parser()._actions}
    assert options == {*arguments, *of_data, *of_base, *of_adapter, *of_run, *elsewhere}

    read = {name: given["load_data"][name] for name in ("max_length", "held_out_fraction", "seed", "use_chat_template")}
    assert read == {"max_length": 40, "held_out_fraction": 0.2, "seed": 7, "use_chat_template": False}
    quantize = {"quant_type": "fp4", "blocksize": 32, "double_quant": False, "skip": ["down_proj"]}
    loaded = given["load_model"]
    assert {**loaded["quantize"], "skip": list(loaded["quantize"]["skip"])} == quantize
    assert (loaded["dtype"], loaded["attention"]) == (torch.float32, "eager")
    adapter = json.loads((arguments["output"] / "adapter_config.json").read_text())
    expected = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "use_rslora": True}
    assert {name: adapter[name] for name in expected} == expected
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    assert len(given["held_out_loss"]["examples"]) == 3
    assert given["train"]["schedule"] == Schedule(
        steps=2,  # half of 24 examples are two steps of 6
        batch_size=3,
        accumulate=2,
        lr=3e-3,
        kind="cosine",
        warmup=2,
        eval_steps=1,
        save_steps=2,
        seed=7,
        gradient_checkpointing=True,
        loss_chunk=5,
        optimizer=OptimizerChoice("paged_adamw8", None, 1 << 20, of_run["page-file"]),
    )


def test_trainer_is_told_all_of_a_schedule(tmp_path: Path) -> None:
    changes = {"steps": 50, "batch_size": 3, "accumulate": 4, "lr": 2e-3}
    changes |= {"kind": "cosine", "warmup": 5, "eval_steps": 7}
    schedule = replace(SCHEDULE, **changes, save_steps=9, seed=11, gradient_checkpointing=True)
    told = _arguments(schedule, tmp_path, torch.device("cpu"), autocast=True)
    assert (told.max_steps, told.per_device_train_batch_size, told.gradient_accumulation_steps) == (50, 3, 4)
    assert (told.learning_rate, told.lr_scheduler_type, told.get_warmup_steps(50)) == (2e-3, "cosine", 5)
    assert (told.eval_steps, told.save_steps, told.seed, told.bf16) == (7, 9, 11, True)
    assert getattr(told, f"{CHECKPOINTING}_checkpointing")


def test_chunked_loss_and_eager_attention_train_as_the_whole_one_and_sdpa(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    assert cli.main(words({**arguments, "loss-chunk": 0, "attention": "sdpa"})) == 0
    whole = json.loads((arguments["output"] / "report.json").read_text(encoding="utf-8"))
    assert (whole["loss_chunk"], whole["attention"]) == (None, "sdpa")
    options = {"loss-chunk": 2, "attention": "eager"}
    assert cli.main(words({**arguments, "output": tmp_path / "chunked", **options})) == 0
    chunked = json.loads((tmp_path / "chunked" / "report.json").read_text(encoding="utf-8"))
    assert (chunked["loss_chunk"], chunked["attention"]) == (2, "eager")
    assert chunked["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    assert chunked["held_out_loss_after"] == pytest.approx(whole["held_out_loss_after"], rel=1e-3)


@pytest.mark.parametrize("kind", ["paged_adamw32", "paged_adamw8"])
def test_paged_optimizer(kind: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    output: Path = arguments["output"]
    paged = {**arguments, "optimizer": kind, "host-budget": "4K", "page-file": output / "pages", "save-steps": 2}
    if torch.cuda.is_available():
        paged["device-budget"] = 0
    assert cli.main(words(paged)) == 0
    captured = capsys.readouterr()
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    states = report["optimizer"]
    assert (states["kind"], states["host_bytes"], states["device_bytes"]) == (kind, 0, 0)
    assert report["optimizer_bytes"] == states["file_bytes"] > 0
    assert states["moved_bytes"] > 0
    mib = f"{states['file_bytes'] / 2**20:.1f} MiB in the page file"
    assert f"optimizer: {kind}, states: {mib}; " in captured.out
    assert report["arguments"]["page_file"] == str(output / "pages")
    assert report["arguments"]["host_budget"] == 4096
    assert not (output / "pages").exists()

    # The same without a file, and from the middle on.
    shutil.rmtree(output / "checkpoint-3")
    assert cli.main(words({**arguments, "optimizer": kind, "resume": True})) == 0
    resumed = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert resumed["losses"] == report["losses"]
    assert resumed["held_out_loss_after"] == report["held_out_loss_after"]
    assert resumed["optimizer"]["file_bytes"] == 0


def test_peft_reads_the_adapter(model: Path, arguments: dict[str, Any]) -> None:
    assert cli.main(words({**arguments, "method": "lora", "dtype": "fp32", "target-modules": "q_proj,up_proj"})) == 0
    ours = load_model(open_checkpoint(str(model)), dtype=torch.float32, device=torch.device("cpu"))
    qlora_ext.load_adapter(ours, arguments["output"])
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), arguments["output"])
    ids = torch.arange(12)[None]
    plain = LlamaForCausalLM.from_pretrained(model)(ids).logits
    assert (ours(ids).logits - plain).abs().max() > 1e-4, "the adapter does something"
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    config = json.loads((arguments["output"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)


@pytest.mark.parametrize(("length", "attention"), [(128, "eager"), (129, "sdpa")])
def test_plain_text_and_no_held_out_part(
    length: int, attention: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was a dark and stormy night. " * 80 + "The end.")
    options = {"data": text, "eval-fraction": 0, "max-length": length, "dtype": "bf16", "steps": 1}
    assert cli.main(words({**arguments, **options})) == 0
    report = json.loads((arguments["output"] / "report.json").read_text(encoding="utf-8"))
    assert report["held_out_loss_before"] is None
    assert report["samples"][0]["prompt"]
    assert report["attention"] == (attention if not torch.cuda.is_available() else "sdpa")


PAGED = {"optimizer": "paged_adamw32"}
NOT_PAGED = "expected a paged --optimizer with it, got adamw"
NO_REGEX = "error: --target-modules: expected a regular expression, got"
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"data": "gone.jsonl"}, "--data gone.jsonl: no such file"),
    "no model": ({"model": "./gone"}, "gone: no such file or folder"),
    "a model that is none": ({"model": str(ROOT / "tests")}, "expected a model folder with config.json"),
    "output is a file": ({"output": __file__}, "not a folder"),
    "steps": ({"steps": "-1"}, "argument --steps: expected a whole number above 0, got '-1'"),
    "lr": ({"lr": "inf"}, "argument --lr: expected a number above 0, got 'inf'"),
    "eval fraction": ({"eval-fraction": 1}, "argument --eval-fraction: expected a number from 0 to below 1"),
    "loss chunk": ({"loss-chunk": -1}, "argument --loss-chunk: expected a whole number, 0 or more, got '-1'"),
    "attention": ({"attention": "none"}, "argument --attention: invalid choice: 'none'"),
    "attention that is not there": ({"attention": "flash_attention_3"}, "error: --attention flash_attention_3: "),
    "steps and epochs": ({"epochs": 1}, "not allowed with argument"),
    "optimizer": ({"optimizer": "sgd"}, "argument --optimizer: invalid choice"),
    "size": ({"host-budget": "2GB"}, "argument --host-budget: expected bytes, as 512M, 2G or 536870912, got '2GB'"),
    "device budget of adamw": ({"device-budget": "1G"}, f"--device-budget: {NOT_PAGED}"),
    "host budget of adamw": ({"host-budget": 0}, f"--host-budget: {NOT_PAGED}"),
    "page file of adamw": ({"page-file": "pages"}, f"--page-file: {NOT_PAGED}"),
    "no page file": ({**PAGED, "host-budget": 0}, "--host-budget: expected --page-file with it"),
    "no folder": ({**PAGED, "page-file": "gone/pages"}, "--page-file gone/pages: no such folder"),
    "device budget on the CPU": (
        {**PAGED, "device-budget": 0},
        "--device-budget: expected training on a GPU, got the CPU",
    ),
    "method": ({"method": "dora"}, "argument --method: invalid choice"),
    "blocksize": ({"blocksize": 48}, "blocksize: expected a power of two"),
    "target modules": ({"target-modules": "q_proj,nothing"}, "'nothing'"),
    "target regex": ({"target-modules": "(", "method": "lora"}, f"{NO_REGEX} '('"),
    "target repeat": ({"target-modules": "q{99999999999}", "method": "lora"}, f"{NO_REGEX} 'q{{99999999999}}'"),
    "no targets": ({"target-modules": "none"}, "--target-modules: expected --target-parameters with none"),
    "target parameters": ({"target-parameters": "experts.down_proj"}, "in 4 bits (here, by their last parts: none)"),
    "target parameters of lora": ({"method": "lora", "target-parameters": "x"}, "expected --method qlora with it"),
    "target parameters dropped": (
        {"target-parameters": "x", "lora-dropout": 0.1},
        "--target-parameters: expected --lora-dropout 0 with it, got 0.1",
    ),
    "eval steps without examples": ({"eval-steps": 1, "eval-fraction": 0}, "--eval-steps: expected examples held out"),
    "resume and overwrite": ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
    "nothing to resume": ({"resume": True}, "--resume: no checkpoint in"),
    "answer beyond max length": ({"max-length": 4}, "no example has a token to learn within 4 tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(
    mistake: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_ext.finetune.run._device", lambda method: torch.device("cpu"))
    changes, message = MISTAKES[mistake]
    try:
        code = cli.main(words({**arguments, **changes}))
    except SystemExit as exit_:  # argparse
        code = exit_.code
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert "error: " in last_line
    assert message in last_line
    assert not arguments["output"].exists()


def test_bad_line_of_data_is_named(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n["a", "b"]\n')
    assert cli.main(words({**arguments, "data": bad})) == 2
    assert f"error: {bad}, line 2: expected a JSON object, got an array" in capsys.readouterr().err
    bad.write_text("")
    assert cli.main(words({**arguments, "data": bad})) == 2
    assert f"error: {bad}: the file is empty" in capsys.readouterr().err


def test_diverged_last_step_is_an_error(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words({**arguments, "steps": 1, "lr": 1e30})) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("error: the held-out loss is nan at step 1: try a lower learning rate")
    assert not (arguments["output"] / "report.json").exists()


def test_ctrl_c_outside_the_training_loop(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_ext.finetune.run.run", interrupted)
    assert cli.main(words(arguments)) == 130
    assert "--resume" in capsys.readouterr().err


def test_help_says_every_option_and_default() -> None:
    parser = cli.parser()
    text = " ".join(parser.format_help().split())
    for action in parser._actions:  # argparse has no public list
        assert action.help, action.dest
        assert max(action.option_strings, key=len) in text
    for default in ("0.0002", "linear", "all-linear", "nf4"):
        assert f"(default: {default})" in text
