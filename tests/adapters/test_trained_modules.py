"""What is trained beside an adapter goes into its file and out of it, as PEFT's modules_to_save."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_model import logits, trainable, with_compiled
from random_layers import state_bytes
from reference import assert_same
from safetensors.torch import load_file
from tiny_model import tiny_config
from torch import nn
from trained_models import CONFIG, MODELS, WEIGHTS, Model, adapted, by_model, change, config_of, make, others, trained
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora_ext import LoraConfig, add_adapter, delete_adapter, load_adapter, quantize_model, save_adapter, set_adapter

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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_peft_saves_of_a_larger_vocabulary_is_read(tied: bool, tmp_path: Path) -> None:
    """Which it does by itself where the model's folder has a smaller one."""
    base = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / WEIGHTS)
    ours = quantize_model(copy.deepcopy(base))
    load_adapter(ours, tmp_path)
    expected = logits(ours)
    embeddings = [ours.get_input_embeddings().weight, ours.get_output_embeddings().weight]
    for weight in embeddings:
        weight.data.mul_(2)
    assert not torch.equal(logits(ours), expected)
    load_adapter(ours, tmp_path)
    assert_same(logits(ours), expected)
    assert not any(weight.requires_grad for weight in embeddings)
    load_adapter(ours, tmp_path, "another")  # which wants the same values
    embeddings[0].data.mul_(2)
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight: expected the file's values already there, for adapters"
    ):
        load_adapter(ours, tmp_path, "a third")
    theirs.base_model.model.resize_token_embeddings(base.config.vocab_size + 8)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight: expected torch.float32 \[\d+, 64\], got torch.float32 \["
    ):
        load_adapter(copy.deepcopy(base), tmp_path)


def test_what_is_tied_here_is_tied_in_peft(tmp_path: Path) -> None:
    build, names = MODELS["tied"]
    save_adapter(trained(build(), names), tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).base_model.model
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight


def test_peft_loads_a_tied_head_with_a_bias(tmp_path: Path) -> None:
    """Which PEFT would drop where it ties."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    base = PhiForCausalLM(PhiConfig(tie_word_embeddings=True, **sizes)).eval()
    ours = trained(base, ["lm_head"], ["q_proj"])
    save_adapter(ours, tmp_path)
    assert others(tmp_path).keys() == {"lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"}
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(ours))


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
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    change(theirs.base_model.model.score.modules_to_save["default"])
    theirs.save_pretrained(tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier", "score"]
    load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base), logits(theirs))


# --- what is saved --------------------------------------------------------------------------------------------------


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


def test_of_a_loaded_module_the_float_parameters_train(tmp_path: Path) -> None:
    def build() -> nn.Module:
        norm = nn.BatchNorm1d(8)  # with buffers of floats and of an integer
        norm.ids = nn.Parameter(torch.arange(3), requires_grad=False)
        return nn.ModuleDict({"proj": nn.Linear(8, 8), "norm": norm})

    model, loaded = build(), build()
    add_adapter(model, LoraConfig(r=2, target_modules=["proj"]))
    model["norm"].weight.requires_grad_(True)
    model["norm"](torch.randn(4, 8))
    model["norm"].ids.data += 1
    save_adapter(model, tmp_path)
    load_adapter(loaded, tmp_path)
    assert state_bytes(loaded["norm"]) == state_bytes(model["norm"])
    tensors = {**dict(loaded["norm"].named_parameters()), **dict(loaded["norm"].named_buffers())}
    assert {name for name, tensor in tensors.items() if tensor.requires_grad} == {"weight", "bias"}


def test_what_is_tied_to_a_frozen_part_of_a_trained_module_goes_with_it(tmp_path: Path) -> None:
    def build() -> Model:
        model = adapted()
        del model.frozen["extra"]
        model.frozen["twin"] = nn.Linear(8, 8).requires_grad_(False)
        model.frozen["twin"].weight = model.block.inner.weight
        return model

    model, loaded = build(), build()
    nn.init.normal_(model.block.scale.requires_grad_(True))
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["block", "frozen.twin"]
    load_adapter(loaded, tmp_path)
    assert state_bytes(loaded) == state_bytes(model)
    assert loaded.frozen["twin"].weight is loaded.block.inner.weight


def test_a_compiled_head_is_saved_and_loaded_as_the_plain_one(tmp_path: Path) -> None:
    model = trained(make(LlamaForSequenceClassification), ["score"])
    save_adapter(model, tmp_path / "plain")
    save_adapter(with_compiled("score")(model), tmp_path / "compiled")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = with_compiled("score")(make(LlamaForSequenceClassification))
    load_adapter(loaded, tmp_path / "plain")
    assert_same(logits(loaded), logits(model))


def t5() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=128)
        return T5ForConditionalGeneration(config).eval()


def t5_logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(14).view(2, 7)
    result: torch.Tensor = model(input_ids=ids, decoder_input_ids=ids).logits.detach()
    return result


def test_embeddings_that_are_tied_to_each_other(tmp_path: Path) -> None:
    """T5's, in three places: PEFT's own tying knows a head only."""
    ours = trained(t5(), ["shared"], ["q", "v"])
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(t5(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(t5_logits(theirs), t5_logits(ours))
    loaded = t5()
    load_adapter(loaded, tmp_path / "ours")
    assert_same(t5_logits(loaded), t5_logits(ours))


def test_who_freezes_what_another_adapter_trained_is_told(tmp_path: Path) -> None:
    build, names = MODELS["head"]
    model = trained(build(), names)
    save_adapter(model, tmp_path)
    with pytest.warns(
        UserWarning, match=r"^add_adapter: score.weight: trained beside another adapter, now frozen"
    ) as told:
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), "other")
    assert told[0].filename == __file__
    set_adapter(model, "default")
    delete_adapter(model, "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path)
        assert model.score.weight.requires_grad


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and more")])
def test_of_many_that_are_frozen_five_are_told(count: int, more: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), *(nn.Linear(8, 8, bias=False) for _ in range(count)))
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "first")
    model[1:].requires_grad_(True)
    told = ", ".join(f"{i}.weight" for i in range(1, 6)) + more
    with pytest.warns(UserWarning, match=f"^add_adapter: {told}: trained beside"):
        add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "second")


def test_one_modules_name_may_begin_as_anothers(tmp_path: Path) -> None:
    model = nn.ModuleDict({"proj": nn.Linear(64, 64), "head": nn.Linear(64, 8), "head2": nn.Linear(64, 8)})
    add_adapter(model, LoraConfig(r=2, target_modules=["proj"]))
    for name in ("head", "head2"):
        model[name].requires_grad_(True)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["head", "head2"]


def test_a_model_may_have_no_embeddings(tmp_path: Path) -> None:
    class Images(nn.Sequential):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    model = Images(nn.Linear(64, 64))
    add_adapter(model, LoraConfig(r=2))
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
