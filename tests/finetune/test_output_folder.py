from __future__ import annotations

import errno
import fcntl
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from full_disk import largest_file
from safetensors.torch import load_file
from tiny_model import CHATML, tiny_tokenizer
from tiny_model import one_thread as one_thread
from tiny_training import DATA, SCHEDULE, build, damage_one_bit, run
from transformers import AutoModelForCausalLM

from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune.output_folder import LOCK, OutputFolder, newest_checkpoint
from qlora_ext.finetune.train import resumable, train

REPORTS = {"run.json", "report.json", "report.png"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_earlier_run_is_not_mixed_with_a_new_one(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(arguments)) == 0
    with pytest.raises(SystemExit, match="2"):
        cli.main(words(arguments))
    assert "holds an earlier run: add --resume or --overwrite" in capsys.readouterr().err
    assert cli.main(words({**arguments, "steps": 1, "overwrite": True})) == 0
    assert [path.name for path in arguments["output"].glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_model_is_not_overwritten(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {**arguments, "model": tmp_path / "own", "method": "full"}
    shutil.copytree(arguments["model"], own["model"])
    shutil.copytree(own["model"], tmp_path / "other")
    for output, overwrite, reason in (
        ("own", True, "expected a folder that does not hold --model"),
        ("own", None, "expected a folder that does not hold --model"),
        ("", True, "expected a folder that does not hold --model"),
        ("other", None, "holds a model or an adapter: add --overwrite"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(words({**own, "output": tmp_path / output, "overwrite": overwrite}))
        assert reason in capsys.readouterr().err
    assert cli.main(words({**own, "output": tmp_path / "other", "overwrite": True})) == 0


@pytest.mark.parametrize("methods", [("lora", "full"), ("full", "lora")], ids=" then ".join)
def test_nothing_of_another_run_stays_beside_a_new_one(methods: tuple[str, str], arguments: dict[str, Any]) -> None:
    """transformers puts an adapter that it finds in the folder on the model that it finds there."""
    output: Path = arguments["output"]
    for method in methods:
        assert cli.main(words({**arguments, "method": method, "overwrite": True})) == 0
        (output / "notes.txt").write_text("mine")
    own = MODEL | TOKENIZER if methods[1] == "full" else ADAPTER
    assert {path.name for path in output.iterdir()} == REPORTS | own | {"checkpoint-3", "notes.txt"}
    if methods[1] == "full":
        got, stored = AutoModelForCausalLM.from_pretrained(output), load_file(output / "model.safetensors")
        assert torch.equal(got.model.layers[0].mlp.up_proj.weight, stored["model.layers.0.mlp.up_proj.weight"])


def test_what_no_run_has_written_stays(arguments: dict[str, Any]) -> None:
    own = [arguments["output"] / name for name in ("config.json", "checkpoint-notes.txt", "checkpoint-best/model.json")]
    own[-1].parent.mkdir(parents=True)
    for path in own:
        path.write_text("mine")
    assert cli.main(words(arguments)) == 0
    assert cli.main(words({**arguments, "overwrite": True})) == 0
    assert [path.read_text() for path in own] == ["mine"] * len(own)


OF_A_RUN = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.0.tmp", "run.json"),
    *("report.json", "report.png", "run.json.0.tmp", "report.json.0.tmp", "report.png.0.tmp"),
    ".incomplete/checkpoint-9/model",
    *("checkpoint-3/model.safetensors", "checkpoint-12/model.safetensors"),
)
BESIDE_A_MODEL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "vocab.json", "merges.txt"),
    *("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


@pytest.mark.parametrize(
    "weights", ["", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_overwrite_deletes_what_runs_write_and_nothing_else(weights: str, tmp_path: Path) -> None:
    """A tokenizer of one's own stays, but where it is a model's, which goes."""
    folder, others = (
        tmp_path / "out",
        {"notes.txt", "checkpoint-7", "checkpoint-best/model", "run.json.bak", "model.txt"},
    )
    for name in (*OF_A_RUN, *BESIDE_A_MODEL, *others, *filter(None, [weights])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (tmp_path / "precious").mkdir()
    (folder / "checkpoint-5").symlink_to(tmp_path / "precious")
    with OutputFolder(folder) as output:
        output.begin(resume=False, overwrite=True)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == others | (set() if weights else set(BESIDE_A_MODEL))
    assert (tmp_path / "precious").exists()
    assert not (folder / "checkpoint-5").is_symlink()


def test_the_lock_is_a_file_of_its_own(tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    with OutputFolder(tmp_path):
        lock.unlink()
        lock.write_text("another run's, in a folder that was made anew")
    assert lock.exists()
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=LOCK), OutputFolder(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_where_there_are_no_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with OutputFolder(tmp_path / "new") as output:
        output.begin(resume=False, overwrite=False)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("change", ["", "overwrite", "resume"])
def test_two_runs_do_not_share_a_folder(
    change: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output: Path = arguments["output"]
    if change:
        assert cli.main(words(arguments)) == 0
        arguments |= {change: True, "steps": 4}
    before = {path.name for path in output.glob("*")}
    with OutputFolder(output) as other:
        other.begin(resume=True, overwrite=False)
        shown = {path.name for path in output.iterdir()}
        assert cli.main(words(arguments)) == 2
        assert {path.name for path in output.iterdir()} == shown
    assert f"error: --output {output}: expected no other run in it, got one at work" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == before - {"report.json", "report.png"}, "no lock is left"
    assert cli.main(words(arguments)) == 0


def test_run_that_ended_meanwhile_is_not_overwritten(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found an empty folder when they began."""
    assert cli.main(words(arguments)) == 0
    monkeypatch.setattr(cli, "earlier_run", lambda path: None)
    kept = (arguments["output"] / "adapter_model.safetensors").read_bytes()
    assert cli.main(words({**arguments, "seed": 3})) == 2
    assert "holds an earlier run: add --resume or --overwrite" in capsys.readouterr().err
    assert (arguments["output"] / "adapter_model.safetensors").read_bytes() == kept


# method, the largest file that fits, what does not: the model has 360 KB, its adapter 131, AdamW's states twice that
FULL = [
    ("lora", 30_000, r"checkpoint-3/adapter_model\.safetensors: not written: .*"),
    ("lora", 200_000, r"\S+: not written, is the disk full\? .*"),
    ("full", 200_000, r"\S+: not written: .*"),
    ("lora", 500, r"\[Errno 27\] File too large: .*"),
]


@pytest.mark.parametrize(("method", "size", "reason"), FULL, ids=["adapter", "states", "model", "note of the run"])
def test_full_disk_is_one_line(
    method: str, size: int, reason: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with largest_file(size):
        assert cli.main(words({**arguments, "method": method, "r": 16})) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(f"error: .*{reason}", last_line), last_line
    assert {path.name for path in arguments["output"].iterdir()} <= {"run.json"}


def test_templates_in_a_folder_are_replaced_when_a_run_goes_on(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer({"default": CHATML, "tool_use": CHATML})  # one of them is saved in a folder
    for steps in (1, 2):
        schedule = replace(SCHEDULE, steps=steps, save_steps=1)
        before = resumable(tmp_path, schedule) if steps > 1 else None
        train(build("full"), tokenizer, DATA, schedule, tmp_path, adapter=False, resume=before)
    assert [path.name for path in (tmp_path / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]


def test_two_checkpoints_stay_and_what_was_put_aside(tmp_path: Path) -> None:
    run(tmp_path, steps=1, save_steps=1)
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-1-good")
    run(tmp_path, steps=11, save_steps=1)
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-1-good", "checkpoint-10", "checkpoint-11"}
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-11"


@pytest.mark.parametrize("output", ["circle", "x" * 300, "null\0"], ids=["circle", "long", "null"])
def test_names_that_no_folder_can_have(
    output: str, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(SystemExit, match="2"):
        cli.main(words({**arguments, "output": tmp_path / output}))
    assert "error: --output" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_checkpoint_that_is_refused_costs_no_report(
    damage: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(arguments)) == 0
    output = arguments["output"]
    (checkpoint,) = output.glob("checkpoint-*")
    damage_one_bit(checkpoint / "scheduler.pt")
    if damage == "missing":
        (checkpoint / "scheduler.pt").unlink()
    before = {path.name for path in output.iterdir()}
    assert cli.main(words({**arguments, "steps": 4, "resume": True})) == 2
    assert f"scheduler.pt: {damage}; delete {checkpoint}" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == before


WEIGHTS = [("lora", "adapter_model.safetensors"), ("full", "model.safetensors")]
BESIDE_WEIGHTS = [("lora", "adapter_config.json"), ("full", "config.json"), ("lora", "trainer_state.json")]


@pytest.mark.parametrize("steps", [3, 4], ids=["none left", "one left"])
@pytest.mark.parametrize(
    ("method", "name", "damage"),
    [*((*each, "missing") for each in WEIGHTS + BESIDE_WEIGHTS), *((*each, "damaged") for each in WEIGHTS)],
)
def test_a_checkpoint_without_weights_or_state_costs_no_report(
    method: str, name: str, damage: str, steps: int, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments |= {"method": method, "samples": 0}
    assert cli.main(words(arguments)) == 0
    output = arguments["output"]
    (output / "report.png").unlink()  # as of a run that ended while it was drawn
    (checkpoint,) = output.glob("checkpoint-*")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if damage == "damaged":
        (checkpoint / name).write_bytes(content[:-9])
    before = {path.name for path in output.iterdir()}
    assert cli.main(words({**arguments, "steps": steps, "resume": True})) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in last_line
    assert last_line.endswith(f"; delete {checkpoint} and --resume goes on from the one before, if any")
    assert {path.name for path in output.iterdir()} == before


def test_a_run_that_is_reported_needs_no_weights_in_its_checkpoint(arguments: dict[str, Any]) -> None:
    assert cli.main(words(arguments)) == 0
    (arguments["output"] / "checkpoint-3" / "adapter_model.safetensors").unlink()
    assert cli.main(words({**arguments, "resume": True})) == 0
