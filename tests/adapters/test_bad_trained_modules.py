"""What cannot go with an adapter, or does not fit the model, is refused by name, and the model is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from adapted_model import everything, logits
from reference import assert_same
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trained_models import (
    EMBEDDINGS,
    MODELS,
    PREFIX,
    WEIGHTS,
    Model,
    WithExtraState,
    adapted,
    config_of,
    make,
    others,
    trained,
)
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from qlora_ext import LoraConfig, add_adapter, load_adapter, quantize_model, save_adapter, set_adapter
from qlora_ext.adapters.files import resume_adapter

# --- what is not saved ------------------------------------------------------------------------------------------------


def train_bias_in_4_bits(model: Model) -> None:
    quantize_model(model.frozen)
    model.frozen["block"].inner.bias.requires_grad_(True)


def train_around_4_bits(model: Model) -> None:
    quantize_model(model.frozen)
    model.frozen["block"].scale.requires_grad_(True)


def train_around_extra_state(model: Model) -> None:
    model.block.extra = WithExtraState().requires_grad_(False)
    model.block.scale.requires_grad_(True)


UNSAVABLE: dict[str, tuple[Callable[[Model], object], str]] = {
    "of-the-model": (lambda model: model.offset.requires_grad_(True), "got offset in the model itself"),
    "list": (lambda model: model.list.requires_grad_(True), "got list.0 in a ParameterList"),
    "base-of-an-adapter": (
        lambda model: model.proj.base_layer.bias.requires_grad_(True),
        "got proj.base_layer.bias in a layer with an adapter",
    ),
    "4-bit": (train_bias_in_4_bits, "got frozen.block.inner.bias in a layer in 4 bits"),
    "around-4-bit": (train_around_4_bits, "got frozen.block.scale in a layer in 4 bits"),
    "around-extra-state": (train_around_extra_state, "got block.scale in a module that saves more than tensors"),
    "extra-state": (
        lambda model: model.frozen["extra"].requires_grad_(True),
        "got frozen.extra.weight, frozen.extra.bias in a module that saves more than tensors",
    ),
}


@pytest.mark.parametrize(("train", "message"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_what_peft_could_not_save_is_named(train: Callable[[Model], object], message: str, tmp_path: Path) -> None:
    model = adapted()
    train(model)
    with pytest.raises(ValueError, match=f"save_adapter: model: expected trained parameters .*{message}.*freeze"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.requires_grad_(False)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] is None
    assert not others(tmp_path)


def test_of_many_trained_parameters_five_are_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"proj": nn.Linear(8, 8), "list": nn.ParameterList(torch.ones(1) for _ in range(6))})
    add_adapter(model, LoraConfig(r=2, target_modules=["proj"]))
    five = r"got list\.0, list\.1, list\.2, list\.3, list\.4"
    for count, more in ((5, ""), (6, " and more")):
        for parameter in list(model["list"])[:count]:
            parameter.requires_grad_(True)
        with pytest.raises(ValueError, match=f"{five}{more} in a ParameterList"):
            save_adapter(model, tmp_path)


def test_a_name_that_peft_would_take_to_mean_a_layer_with_an_adapter_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "inner": nn.ModuleDict({"head": nn.Linear(8, 8)})})
    add_adapter(model, LoraConfig(r=2, target_modules=["inner.head"]))
    model["head"].requires_grad_(True)
    with pytest.raises(ValueError, match=r"save_adapter: model: head: .*inner\.head too, in a layer with an adapter"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("kind", [nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList])
def test_a_name_that_peft_would_take_to_mean_what_is_never_called_is_refused(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "proj": nn.Linear(8, 8), "inner": nn.ModuleDict({"head": kind()})})
    add_adapter(model, LoraConfig(r=2, target_modules=["proj"]))
    model["head"].requires_grad_(True)
    with pytest.raises(ValueError, match=rf"save_adapter: model: head: .*inner\.head too, in a {kind.__name__}"):
        save_adapter(model, tmp_path)


# --- what does not fit ------------------------------------------------------------------------------------------------


def spoilt(folder: Path, put: dict[str, Tensor], drop: str = "") -> None:
    tensors = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if key != PREFIX + drop}
    save_file(tensors | {PREFIX + key: tensor for key, tensor in put.items()}, folder / WEIGHTS)


MISFITS: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "missing": ({}, "lm_head.weight", r"lm_head\.weight: expected torch.float32 \[258, 64\], got no tensor"),
    "shape": ({"lm_head.weight": torch.ones(8, 64)}, "", r"lm_head\.weight: expected .*\[258, 64\], got .*\[8, 64\]"),
    "integers": ({"lm_head.weight": torch.ones(258, 64, dtype=torch.int8)}, "", r"lm_head\.weight.*got torch.int8"),
    "not-of-the-module": (
        {"lm_head.bias": torch.ones(258)},
        "",
        r"expected keys.*modules_to_save, got .*lm_head\.bias",
    ),
    "tied": ({f"{EMBEDDINGS}.weight": torch.ones(258, 64)}, "", r"expected the same values as model\.embed_tokens"),
    "tied-missing": ({}, f"{EMBEDDINGS}.weight", r"embed_tokens\.weight: expected .*, got no tensor"),
}


@pytest.mark.parametrize(("put", "drop", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_and_changes_nothing(
    put: dict[str, Tensor], drop: str, message: str, tmp_path: Path
) -> None:
    build, names = MODELS["tied"]
    save_adapter(trained(build(), names), tmp_path)
    spoilt(tmp_path, put, drop)
    for model in (build(), trained(build(), [])):
        before = everything(model)
        with pytest.raises(ValueError, match=f"load_adapter: .*{WEIGHTS}: .*{message}"):
            load_adapter(model, tmp_path)
        assert everything(model) == before


@pytest.mark.parametrize(("asked", "missing"), [("model.embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_pefts_untied_embeddings_do_not_fit_a_tied_model(asked: str, missing: str, tmp_path: Path) -> None:
    base = make(LlamaForCausalLM)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[asked])
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{missing}\.weight.*no tensor \({asked}\.weight, to which it is tied"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("kind", ["4-bit", "adapter"])
def test_a_module_in_another_form_is_refused(kind: str, tmp_path: Path) -> None:
    base = make(LlamaForSequenceClassification)
    save_adapter(trained(base, ["score"]), tmp_path)
    if kind == "4-bit":
        quantize_model(base, skip=())
    else:
        add_adapter(base, LoraConfig(target_modules=["score"]), "other")
    before = everything(base)
    with pytest.raises(ValueError, match=rf"load_adapter: model: score: .*{WEIGHTS}.* in a layer .*{kind[2:]}"):
        load_adapter(base, tmp_path)
    assert everything(base) == before


def test_a_head_that_another_adapter_is_used_with_is_not_changed(tmp_path: Path) -> None:
    base = make(LlamaForSequenceClassification)
    first, second = (trained(base, ["score"]) for _ in "12")
    for model, name in ((first, "a"), (second, "b")):
        save_adapter(model, tmp_path / name)
    load_adapter(base, tmp_path / "a", "a")
    before = everything(base)
    with pytest.raises(ValueError, match=r"load_adapter: model: score\.weight: .*adapters \['a'\]"):
        load_adapter(base, tmp_path / "b", "b")
    assert everything(base) == before
    load_adapter(base, tmp_path / "a", "again")  # the same values
    set_adapter(base, "a")
    assert_same(logits(base), logits(first))


def test_a_head_that_another_adapter_is_used_with_may_be_in_another_dtype(tmp_path: Path) -> None:
    save_adapter(trained(make(LlamaForSequenceClassification), ["score"]), tmp_path)
    base = make(LlamaForSequenceClassification).bfloat16()
    load_adapter(base, tmp_path, "a")
    load_adapter(base, tmp_path, "again")


@pytest.mark.parametrize("fits", [True, False])
def test_tied_modules_may_be_in_dtypes_of_their_own(fits: bool, tmp_path: Path) -> None:
    base = make(LlamaForCausalLM, tie_word_embeddings=True)
    save_adapter(trained(base, ["lm_head"]), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    one, other = (key for key in tensors if ".lora_" not in key)
    tensors[one] = tensors[other].to(torch.float8_e4m3fn)
    if fits:
        tensors[other] = tensors[one].float()
    save_file(tensors, tmp_path / WEIGHTS)
    if fits:
        load_adapter(base, tmp_path)
    else:
        with pytest.raises(ValueError, match="expected the same values as"):
            load_adapter(base, tmp_path)


def test_a_head_on_meta_is_not_filled(tmp_path: Path) -> None:
    base = make(LlamaForSequenceClassification)
    save_adapter(trained(base, ["score"]), tmp_path)
    base.score.to("meta")
    with pytest.raises(ValueError, match=r"load_adapter: model: score\.weight: expected a tensor with values.* meta"):
        load_adapter(base, tmp_path)


def test_a_key_without_its_prefix_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    model[1].weight.requires_grad_()
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | {"1.weight": tensors[f"{PREFIX}1.weight"].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="expected keys"):
        load_adapter(model, tmp_path)


def test_a_module_trained_beside_the_active_adapter_is_used_with_others(tmp_path: Path) -> None:
    """resume_adapter, for a training that goes on, takes it if it trains; with what is in it and does not train."""

    def build() -> nn.Module:
        head = nn.Linear(64, 8)
        head.norm = nn.BatchNorm1d(8, affine=False)
        model = nn.ModuleDict({"proj": nn.Linear(64, 64), "head": head})
        for name in ("a", "b"):
            add_adapter(model, LoraConfig(r=2, target_modules=["proj"]), name)
        head.requires_grad_(True)
        return model

    saved, model = build(), build()
    saved["head"].norm(torch.randn(9, 8))
    save_adapter(saved, tmp_path, "b")
    for load, trains in ((resume_adapter, False), (load_adapter, True)):
        model["head"].requires_grad_(trains)
        before = everything(model)
        with pytest.raises(ValueError, match=r"expected the file's values already there, for adapters \['a'\]"):
            load(model, tmp_path, "b")
        assert everything(model) == before
    resume_adapter(model, tmp_path, "b")
    assert_same(dict(model["head"].state_dict()), dict(saved["head"].state_dict()))
