"""What quantize_model leaves as it is: the heads, and what its skip names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import names_of, randomize_adapters
from reference import assert_same
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    PreTrainedConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    RwkvConfig,
)

from qlora_ext import Linear4bit, LoraConfig, LoraLinear, add_adapter, load_adapter, quantize_model, save_adapter


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        (["q"], ["0.q", "1.q"]),
        (["1.q"], ["1.q"]),
        (["0.q", "q_norm"], ["0.q", "0.q_norm", "1.q_norm"]),
        (["0"], ["0.q", "0.q_norm"]),
    ],
    ids=str,
)
def test_skip_is_by_full_name_or_last_parts_of_a_layer_or_what_it_is_in(skip: list[str], left: list[str]) -> None:
    model = nn.ModuleList(nn.ModuleDict({name: nn.Linear(64, 8) for name in ("q", "q_norm")}) for _ in range(2))
    quantize_model(model, skip=skip)
    assert names_of(model, nn.Linear) == set(left)
    assert names_of(model, Linear4bit) == {"0.q", "0.q_norm", "1.q", "1.q_norm"} - set(left)


class WithHeads(nn.ModuleDict):
    """Its output embeddings have a name of their own, which a layer of the body ends in."""

    def __init__(self) -> None:
        names = ("lm_head", "score", "classifier", "qa_outputs", "proj_out")
        super().__init__({name: nn.Linear(64, 8) for name in names})
        self["body"] = nn.ModuleDict({"proj_out": nn.Linear(64, 8), "up_proj": nn.Linear(64, 8)})

    def get_output_embeddings(self) -> nn.Module:
        return self["proj_out"]


def test_heads_are_left_by_default() -> None:
    bodies = {"body.proj_out", "body.up_proj"}
    assert names_of(quantize_model(WithHeads()), Linear4bit) == bodies
    assert names_of(quantize_model(nn.DataParallel(WithHeads())).module, Linear4bit) == bodies
    assert names_of(quantize_model(WithHeads(), skip=["score"]), nn.Linear) == {"score"}
    compiled = WithHeads()
    compiled["proj_out"] = torch.compile(compiled["proj_out"], backend="eager")
    assert names_of(quantize_model(compiled), Linear4bit) == bodies


def test_output_embeddings_may_be_several_layers() -> None:
    class OfSeveralCodebooks(nn.ModuleDict):
        def get_output_embeddings(self) -> nn.Module:
            return self["outputs"]

    heads = nn.ModuleList(nn.Linear(64, 8) for _ in range(2))
    model = OfSeveralCodebooks({"outputs": heads, "body": nn.Linear(64, 64)})
    assert names_of(quantize_model(model), Linear4bit) == {"body"}
    add_adapter(model, LoraConfig(r=2))
    assert names_of(model, nn.Linear) == {"outputs.0", "outputs.1"}
    assert [type(head) for head in heads] == [nn.Linear] * 2


def test_output_embeddings_are_those_of_any_model_within() -> None:
    class WithoutEmbeddings(nn.Sequential):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    class WithoutHead(nn.Sequential):
        def get_output_embeddings(self) -> Any:
            return self[0].weight if len(self) else self.cls

    # As SentenceTransformers holds a model of transformers, and as others take the head away from one.
    model = WithoutEmbeddings(WithHeads(), WithoutHead(nn.Linear(64, 8)), WithoutHead())
    bodies = {"0.body.proj_out", "0.body.up_proj", "1.0"}
    assert names_of(quantize_model(model), Linear4bit) == bodies
    add_adapter(model, LoraConfig(r=2))
    assert names_of(model, LoraLinear) == bodies


class Other(nn.Linear):
    pass


def test_subclasses_that_are_most_of_the_model_are_named() -> None:
    message = r"4,160 weights stay as they are, in subclasses of nn.Linear \(Other; one .* nn.Linear\); .* 4,096$"
    with pytest.warns(UserWarning, match=message) as told:
        quantize_model(nn.ModuleDict({"proj": nn.Linear(64, 64), "other": Other(64, 65)}))
    assert told[0].filename == __file__


def test_subclasses_that_are_less_or_skipped_or_parametrized_are_not_named() -> None:
    quantize_model(nn.ModuleDict({"proj": nn.Linear(64, 64), "other": Other(64, 65)}), skip=["other"])
    quantize_model(nn.ModuleDict({"proj": nn.Linear(64, 65), "other": Other(64, 65)}))
    # A layer with a parametrization has a class of its own, but could not become an nn.Linear.
    normed = [parametrizations.weight_norm(nn.Linear(64, 640)) for _ in range(20)]
    quantize_model(nn.Sequential(nn.Linear(64, 64), *normed))
    with pytest.raises(ValueError, match=r"got only subclasses of it \(ParametrizedLinear\)$"):
        quantize_model(nn.Sequential(*normed))


def test_skip_may_be_one_name() -> None:
    model = nn.ModuleDict({"lm_head": nn.Linear(64, 8), "body": nn.Linear(64, 64)})
    quantize_model(model, skip="lm_head")
    assert type(model["lm_head"]) is nn.Linear
    assert isinstance(model["body"], Linear4bit)


def test_a_name_that_nothing_has_is_told() -> None:
    model = nn.ModuleDict({"q_norm": nn.Linear(64, 8), "body": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})
    for name in ("norm", ".body", "bod", "body.weight", "weight", ""):
        with pytest.warns(UserWarning, match=rf"quantize_model: skip: expected names .*, got '{name}'") as told:
            quantize_model(copy.deepcopy(model), skip=["lm_head", name])
        assert [each.filename for each in told] == [__file__]


def test_a_head_of_several_layers_is_left_and_trains_beside_the_adapter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, vocab_size=100)).eval()
    other = copy.deepcopy(model)
    for each in (model, other):
        assert names_of(quantize_model(each), nn.Linear) == {"classifier.dense", "classifier.out_proj"}
    add_adapter(model, LoraConfig(r=2))
    model.classifier.requires_grad_(True)
    randomize_adapters(model)
    nn.init.normal_(model.classifier.out_proj.weight)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    tokens = torch.arange(2, 12)[None]
    assert_same(other(tokens).logits, model(tokens).logits)


GEMMA3N = Gemma3nTextConfig(
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 64},
    **{"num_kv_shared_layers": 0, "laurel_rank": 64, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    layer_types=["full_attention"] * 2,
)
RWKV = RwkvConfig(hidden_size=64, attention_hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64)


@pytest.mark.parametrize(
    ("config", "skip", "targets"),
    [
        (GEMMA3N, ("lm_head", "prediction_coefs", "correction_coefs"), "all-linear"),
        (RWKV, ("head", "attention.output", "feed_forward.value"), ["key", "attention.value", "receptance"]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_readmes_skips_for_models_that_write_to_weights(
    config: PreTrainedConfig, skip: tuple[str, ...], targets: str | list[str]
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.arange(12).view(2, 6)
    quantize_model(model, skip=skip)
    add_adapter(model, LoraConfig(r=2, target_modules=targets))
    for training in (True, False):
        logits = model.train(training)(tokens).logits
        assert logits.isfinite().all()
    model.train()(tokens, labels=tokens).loss.backward()
    left = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not left


def test_skip_must_be_names() -> None:
    for wrong in (None, [3], ["0", None]):
        with pytest.raises(TypeError, match=r"quantize_model: skip: expected names of layers, got"):
            quantize_model(nn.Sequential(nn.Linear(64, 8)), skip=wrong)
