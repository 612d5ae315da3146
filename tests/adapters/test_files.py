"""Adapters on disk: what is written, that it is written whole or not at all, and where it is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted_model import base_model, by_wrapper, logits, trainable, with_adapter
from random_layers import names_of, randomize_adapters, state_bytes
from reference import assert_same
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from qlora_ext import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
)
from qlora_ext.adapters import files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.0\..*proj"], ids=str)
def test_round_trip(targets: str | list[str], tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 7, "lora_dropout": 0.1, "use_rslora": True, "target_modules": targets}
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 3.5}}
    model = with_adapter(**config, **patterns)
    save_adapter(model, str(tmp_path / "new" / "folder"))
    loaded = base_model()
    load_adapter(loaded, tmp_path / "new" / "folder")
    assert state_bytes(loaded) == state_bytes(model)
    assert trainable(loaded) == trainable(model)
    assert_same(logits(loaded), logits(model))
    save_adapter(loaded, tmp_path / "again")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "new" / "folder" / file).read_bytes()


def test_the_folder_holds_two_files_with_plain_names_and_float32(tmp_path: Path) -> None:
    model = with_adapter("mine", r=4, target_modules=["q_proj"]).bfloat16()
    save_adapter(model, tmp_path, "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    q_projs = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert {key: (tuple(t.shape), t.dtype) for key, t in load_file(tmp_path / WEIGHTS).items()} == {
        f"{PREFIX}{name}.{part}.weight": (shape, torch.float32)
        for name in q_projs
        for part, shape in (("lora_A", (4, 64)), ("lora_B", (64, 4)))
    }


def test_the_config_names_model_and_task(tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    add_adapter(model, LoraConfig())
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["task_type"], config["peft_type"], config["inference_mode"]) == ("CAUSAL_LM", "LORA", True)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("LlamaForSequenceClassification", "SEQ_CLS"),
        ("LlamaForTokenClassification", "TOKEN_CLS"),
        ("LlamaForQuestionAnswering", "QUESTION_ANS"),
        ("LlamaModel", None),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ],
)
def test_the_task_is_that_of_the_class(kind: str, task: str | None, tmp_path: Path) -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 258}
    config = transformers.T5Config(**sizes) if kind.startswith("T5") else tiny_config(pad_token_id=0)
    model = getattr(transformers, kind)(config)
    add_adapter(model, LoraConfig(target_modules=["q_proj"] if "Llama" in kind else ["q"]))
    for head in {"score", "qa_outputs"} & model._modules.keys():  # with such a task PEFT demands it
        model.get_submodule(head).requires_grad_(True)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == task


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_how_peft_made_the_first_values_does_not_matter(init: Any, tmp_path: Path) -> None:
    model = with_adapter(r=2)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"init_lora_weights": init}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    loaded = base_model()
    load_adapter(loaded, tmp_path)
    assert_same(logits(loaded), logits(model))


def test_peft_finds_the_class_of_a_classifier_by_its_task(tmp_path: Path) -> None:
    """With such a task PEFT demands the head, which is in the file if it is trained."""
    LlamaForSequenceClassification(tiny_config(pad_token_id=0)).save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    add_adapter(model, LoraConfig(target_modules=["q_proj"]))
    randomize_adapters(model)
    save_adapter(model, tmp_path / "frozen")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, tmp_path / "frozen")), logits(model))
    model.score.requires_grad_(True)
    nn.init.normal_(model.score.weight)
    save_adapter(model, tmp_path / "trained")
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    torch.testing.assert_close(logits(auto), logits(model))


@by_wrapper
def test_a_wrapped_model_is_saved_as_the_plain_one(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = with_adapter(r=4, lora_alpha=3)
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(copy.deepcopy(model)), tmp_path / "wrapped")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_names_that_mean_more_layers_are_saved_as_a_regex(tmp_path: Path) -> None:
    """ "proj" alone would mean the head too."""

    class Model(nn.ModuleDict):
        def get_output_embeddings(self) -> nn.Module:
            return self["head"]["proj"]

    model, loaded = (Model({"proj": nn.Linear(8, 8), "head": nn.ModuleDict({"proj": nn.Linear(8, 8)})}) for _ in "12")
    add_adapter(model, LoraConfig())
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "proj"
    load_adapter(loaded, tmp_path)
    assert names_of(loaded, LoraLinear) == {"proj"}


def test_saving_an_unknown_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_adapter.*name.*'default'.*'other'"):
        save_adapter(with_adapter(), tmp_path / "new", "other")
    assert not (tmp_path / "new").exists()


def save_half(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:1000])
    raise OSError("no space left on device")


def write_half(path: Path, text: str, **_: Any) -> None:
    path.write_bytes(text.encode()[:20])
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("owner", "function", "failing"),
    [(files, "save_file", save_half), (Path, "write_text", write_half)],
    ids=["weights", "config"],
)
def test_a_failed_overwrite_leaves_both_old_files_whole(
    owner: object, function: str, failing: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = with_adapter(r=4), with_adapter(r=8)
    save_adapter(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(owner, function, failing)
    with pytest.raises(OSError, match="no space"):
        save_adapter(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_again_replaces_the_adapter(tmp_path: Path) -> None:
    save_adapter(with_adapter(r=4), tmp_path)
    model = with_adapter(r=8, target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    loaded = base_model()
    load_adapter(loaded, tmp_path)
    assert state_bytes(loaded) == state_bytes(model)


# --- where it is loaded ---------------------------------------------------------------------------------------------


def test_two_adapters_are_loaded_side_by_side(tmp_path: Path) -> None:
    model = with_adapter("a")
    add_adapter(model, LoraConfig(r=3, target_modules=["up_proj"]), "b")
    randomize_adapters(model)
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name, name)
    loaded = base_model()
    for name in ("a", "b"):
        load_adapter(loaded, tmp_path / name, name)
    for names in ("a", "b", ["a", "b"]):
        for each in (model, loaded):
            set_adapter(each, names)
        assert_same(logits(loaded), logits(model))


@by_wrapper
def test_a_wrapped_model_loads_as_the_plain_one(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = with_adapter(r=4)
    save_adapter(model, tmp_path)
    loaded = wrap(base_model())
    assert (logits(loaded) != logits(model)).any()  # and what is compiled is compiled without adapters
    load_adapter(loaded, tmp_path)
    assert_same(logits(loaded), logits(model))
    load_adapter(loaded, tmp_path)  # into the existing one


def test_a_config_without_targets_goes_where_the_tensors_are(tmp_path: Path) -> None:
    """PEFT then goes by the kind of model."""
    model = with_adapter(target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": None}))
    loaded = base_model()
    load_adapter(loaded, tmp_path)
    assert names_of(loaded, LoraLinear) == names_of(model, LoraLinear)


def test_a_loaded_adapter_is_the_active_one_and_trains(tmp_path: Path) -> None:
    save_adapter(with_adapter(target_modules=["q_proj"]), tmp_path)
    model = with_adapter("other")
    load_adapter(model, tmp_path, "loaded")
    assert {name.rsplit(".", 1)[-1] for name in trainable(model)} == {"loaded"}
    assert model.model.layers[0].self_attn.q_proj.active_adapters == ["loaded"]
    assert model.model.layers[0].self_attn.k_proj.active_adapters == []


def test_loading_into_an_existing_adapter_replaces_its_weights_in_place(tmp_path: Path) -> None:
    """In place, so that an optimizer goes on with the same parameters."""
    saved = with_adapter(r=4, lora_alpha=3)
    save_adapter(saved, tmp_path)
    model = with_adapter(r=4, lora_alpha=16)
    parameters = list(model.parameters())
    load_adapter(model, tmp_path)
    assert all(before is after for before, after in zip(parameters, model.parameters(), strict=True))
    assert_same(logits(model), logits(saved))


def test_weights_in_half_precision_become_float32(tmp_path: Path) -> None:
    model = with_adapter(target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    half = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(half, tmp_path / WEIGHTS)
    load_adapter(model, tmp_path)
    for part in ("lora_A", "lora_B"):
        loaded = getattr(model.get_submodule(Q_PROJ), part)["default"].detach()
        assert_same(loaded, half[f"{PREFIX}{Q_PROJ}.{part}.weight"].float())


def test_a_decoder_that_sees_images_is_no_encoder_and_decoder(tmp_path: Path) -> None:
    class ToyForConditionalGeneration(nn.Sequential):
        main_input_name = "input_ids"

    model = ToyForConditionalGeneration(nn.Linear(64, 64))
    add_adapter(model, LoraConfig(r=2))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] is None


def test_files_are_named_when_they_fail_and_closed_when_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space")

    model = nn.Sequential(nn.Linear(64, 64))
    add_adapter(model, LoraConfig(r=2))
    save_adapter(model, tmp_path)
    # By name: how many there are depends on other threads, and on what tests before this one have left to be freed.
    open_files = [file.resolve() for file in Path("/proc/self/fd").iterdir()]
    assert not [file for file in open_files if file.is_relative_to(tmp_path)]
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).mkdir()
    weights = (tmp_path / WEIGHTS).read_bytes()
    nn.init.ones_(model[0].lora_B["default"])
    with pytest.raises(IsADirectoryError, match=CONFIG):
        save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == weights
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    (tmp_path / CONFIG).rmdir()
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"No space.*adapter_model"):
        save_adapter(model, tmp_path)
