"""What is trained beside an adapter goes into its file and out of it, as PEFT's modules_to_save."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_model import everything, logits, trainable, with_compiled
from layers import randomize_adapters, state_bytes
from reference import assert_same
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from qlora_ext import LoraConfig, add_adapter, load_adapter, quantize_model, save_adapter, set_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = "model.embed_tokens"


def make(kind: type[nn.Module], **changes: Any) -> nn.Module:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(tiny_config(pad_token_id=0, **changes)).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "head": (lambda: make(LlamaForSequenceClassification), ["score"]),
    "embeddings": (lambda: make(LlamaForCausalLM, tie_word_embeddings=False), [EMBEDDINGS]),
    "both": (lambda: make(LlamaForCausalLM, tie_word_embeddings=False), ["lm_head", EMBEDDINGS]),
    "tied": (lambda: make(LlamaForCausalLM), ["lm_head", EMBEDDINGS]),
    "norms": (lambda: make(LlamaForCausalLM), ["model.layers.1.input_layernorm", "model.norm"]),
}
by_model = pytest.mark.parametrize(("build", "names"), MODELS.values(), ids=MODELS)


def change(module: nn.Module) -> nn.Module:
    """As training does."""
    for parameter in module.requires_grad_(True).parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def trained(base: nn.Module, names: list[str], targets: list[str] | None = None) -> nn.Module:
    model = copy.deepcopy(base)
    add_adapter(model, LoraConfig(r=2, target_modules=targets or ["q_proj", "up_proj"]))
    randomize_adapters(model)
    for name in names:
        change(model.get_submodule(name))
    return model


def others(folder: Path) -> dict[str, Tensor]:
    """What is in the file beside the adapter, by plain name."""
    tensors = load_file(folder / WEIGHTS)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if ".lora_" not in key}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


# --- both ways ------------------------------------------------------------------------------------------------------


@by_model
def test_round_trip(build: Callable[[], nn.Module], names: list[str], tmp_path: Path) -> None:
    model = trained(build(), names)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == names
    loaded = build()
    load_adapter(loaded, tmp_path)
    assert state_bytes(loaded) == state_bytes(model)
    assert trainable(loaded) == trainable(model)
    assert_same(logits(loaded), logits(model))
    for parameter in model.parameters():  # and into the existing one, in place
        parameter.data.mul_(1.5)
    save_adapter(model, tmp_path)
    parameters = list(loaded.parameters())
    load_adapter(loaded, tmp_path)
    for name, tensor in others(tmp_path).items():
        assert_same(loaded.state_dict()[name], tensor)
    assert all(before is after for before, after in zip(parameters, loaded.parameters(), strict=True))


@by_model
def test_peft_loads_ours(build: Callable[[], nn.Module], names: list[str], tmp_path: Path) -> None:
    ours = trained(build(), names)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(ours))
    kept = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "modules_to_save")}
    assert kept == set(names)


@by_model
@pytest.mark.parametrize("last_parts", [True, False], ids=["last-parts", "names"])
def test_pefts_loads_here(last_parts: bool, build: Callable[[], nn.Module], names: list[str], tmp_path: Path) -> None:
    base = build()
    to_save = [name.rsplit(".", 1)[-1] for name in names] if last_parts else list(names)
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "score"], "modules_to_save": to_save}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(ensure_weight_tying=True, **fields)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    assert (logits(ours) - logits(base)).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert {name.rpartition(".")[0] for name in trainable(ours) if "lora_" not in name} >= set(names) - {"lm_head"}
    save_adapter(ours, tmp_path / "again")
    assert others(tmp_path / "again").keys() == others(tmp_path).keys()


def test_pefts_classifier_loads_here(tmp_path: Path) -> None:
    """PEFT adds the names "classifier" and "score", of which a model has one, and writes "all-linear" out."""
    base = make(LlamaForSequenceClassification)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    change(theirs.base_model.model.score.modules_to_save["default"])
    theirs.save_pretrained(tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier", "score"]
    load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base), logits(theirs))


# --- what is saved --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """It owns a parameter and a buffer, and has a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.inner = nn.Linear(8, 8)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.to(x.dtype) * self.count


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def get_extra_state(self) -> int:
        return 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.block = Block()
        self.list = nn.ParameterList([torch.ones(8)])
        self.offset = nn.Parameter(torch.zeros(8))
        self.frozen = nn.ModuleDict({"block": Block(), "extra": WithExtraState()})

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen["block"](self.block(self.proj(x)) * self.list[0] + self.offset)


def adapted() -> Model:
    torch.manual_seed(0)
    model = Model()
    add_adapter(model, LoraConfig(r=2, target_modules=["proj"]))
    randomize_adapters(model)
    return model


def test_a_module_is_saved_whole_and_in_its_dtype_and_so_is_what_peft_cannot_tell_from_it(tmp_path: Path) -> None:
    model = adapted()
    change(model.block)
    model.block.count += 1
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["block"]  # which PEFT takes to mean frozen.block too
    parts = {"scale", "inner.weight", "inner.bias", "count"}
    assert others(tmp_path).keys() == {f"{block}.{part}" for block in ("block", "frozen.block") for part in parts}
    assert others(tmp_path)["block.scale"].dtype == torch.float64
    x, loaded = torch.randn(2, 8), Model()
    loaded.load_state_dict({n: t for n, t in model.state_dict().items() if n in loaded.state_dict()}, strict=False)
    loaded.proj = copy.deepcopy(model.proj.base_layer)
    for module in (loaded.block, loaded.frozen):
        change(module)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(loaded), str(tmp_path)).eval()
    load_adapter(loaded, tmp_path)
    assert_same(loaded(x), model(x))
    torch.testing.assert_close(theirs(x), model(x))


def test_a_compiled_head_is_saved_and_loaded_as_the_plain_one(tmp_path: Path) -> None:
    model = trained(make(LlamaForSequenceClassification), ["score"])
    save_adapter(model, tmp_path / "plain")
    save_adapter(with_compiled("score")(model), tmp_path / "compiled")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = with_compiled("score")(make(LlamaForSequenceClassification))
    load_adapter(loaded, tmp_path / "plain")
    assert_same(logits(loaded), logits(model))


def train_bias_in_4_bits(model: Model) -> None:
    quantize_model(model.frozen)
    model.frozen["block"].inner.bias.requires_grad_(True)


UNSAVABLE: dict[str, tuple[Callable[[Model], object], str]] = {
    "of-the-model": (lambda model: model.offset.requires_grad_(True), "got offset in the model itself"),
    "list": (lambda model: model.list.requires_grad_(True), "got list.0 in a ParameterList"),
    "base-of-an-adapter": (
        lambda model: model.proj.base_layer.bias.requires_grad_(True),
        "got proj.base_layer.bias in a layer with an adapter",
    ),
    "4-bit": (train_bias_in_4_bits, "got frozen.block.inner.bias in a layer in 4 bits"),
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


def test_a_name_that_would_take_an_adapter_from_a_layer_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "inner": nn.ModuleDict({"head": nn.Linear(8, 8)})})
    add_adapter(model, LoraConfig(r=2, target_modules=["inner.head"]))
    model["head"].requires_grad_(True)
    with pytest.raises(ValueError, match=r"save_adapter: model:.*inner\.head"):
        save_adapter(model, tmp_path)


# --- what does not fit ----------------------------------------------------------------------------------------------


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


def test_pefts_untied_embeddings_do_not_fit_a_tied_model(tmp_path: Path) -> None:
    base = make(LlamaForCausalLM)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight.*no tensor \(model\.embed_tokens\.weight, to which it is tied"
    ):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("kind", ["4-bit", "adapter"])
def test_a_module_in_another_form_is_refused(kind: str, tmp_path: Path) -> None:
    base = make(LlamaForSequenceClassification)
    save_adapter(trained(base, ["score"]), tmp_path)
    if kind == "4-bit":
        quantize_model(base)
    else:
        add_adapter(base, LoraConfig(target_modules=["score"]), "other")
    before = everything(base)
    with pytest.raises(ValueError, match=rf"load_adapter: .*modules_to_save: .*score in a layer .*{kind[2:]}"):
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


def test_a_head_on_meta_is_not_filled(tmp_path: Path) -> None:
    base = make(LlamaForSequenceClassification)
    save_adapter(trained(base, ["score"]), tmp_path)
    base.score.to("meta")
    with pytest.raises(ValueError, match=r"load_adapter: model: score\.weight: expected a tensor with values.* meta"):
        load_adapter(base, tmp_path)
