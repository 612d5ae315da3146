"""Adapters on a whole model: where they go, which count, what trains, and what is left when they are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from adapted_model import TOKENS, base_model, by_wrapper, everything, logits, trainable
from random_layers import TwoPlaces, WithAttention, names_of, randomize_adapters, state_bytes
from reference import assert_same
from tiny_model import tiny_config
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from qlora_ext import Linear4bit, LoraConfig, LoraLinear, add_adapter, delete_adapter, set_adapter

# --- add_adapter ----------------------------------------------------------------------------------------------------


class NestedHead(PreTrainedModel):
    """Its head stands in a submodule."""

    config_class = LlamaConfig

    def __init__(self) -> None:
        super().__init__(tiny_config())
        self.decoder = nn.ModuleDict({"proj": nn.Linear(8, 8), "out": nn.Linear(8, 8)})

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder["out"]


class Plain(nn.Sequential):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.ModuleDict({"proj": nn.Linear(8, 8), "q_proj": nn.Linear(8, 8)}))


MODELS = {
    "head": lambda: LlamaForCausalLM(tiny_config(tie_word_embeddings=False)),
    "tied-head": lambda: LlamaForCausalLM(tiny_config(tie_word_embeddings=True)),
    "classification-head": lambda: LlamaForSequenceClassification(tiny_config(pad_token_id=0)),
    "nested-head": NestedHead,
    "plain": Plain,
}
TARGETS = {
    "all-linear": "all-linear",
    "last-parts": ["q_proj", "v_proj", "proj"],
    "names": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.k_proj", "0.mlp.up_proj", "1.proj", "decoder.proj"],
    "regex": r"(.*\.layers\.0\..*(q|down)_proj)|(1\..*)|(.*\.proj)",
    "head": ["lm_head", "score", "out", "1.proj"],
}


def present(model: nn.Module, targets: str | list[str]) -> str | list[str]:
    """Of a list, the names that this model has."""
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        return targets
    return [target for target in targets if any(f".{name}".endswith(f".{target}") for name in names)]


@pytest.mark.filterwarnings("ignore:.*tie")  # PEFT warns of a tied head
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_adapters_go_where_peft_would_put_them(make_model: Callable[[], nn.Module], targets: str | list[str]) -> None:
    model = make_model()
    targets = present(model, targets)
    task = "SEQ_CLS" if isinstance(model, LlamaForSequenceClassification) else None  # by which PEFT knows a head
    config = peft.LoraConfig(target_modules=targets, task_type=task)
    pefts = peft.inject_adapter_in_model(config, copy.deepcopy(model))
    add_adapter(model, LoraConfig(target_modules=targets))
    assert names_of(model, LoraLinear) == names_of(pefts, peft.tuners.lora.Linear) != set()


def test_all_linear_leaves_out_what_is_tied_to_the_head() -> None:
    decoder = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("proj", "twin", "lm_head")})
    decoder["twin"].weight = decoder["lm_head"].weight
    add_adapter(model := nn.Sequential(decoder), LoraConfig())
    assert names_of(model, LoraLinear) == {"0.proj"}


def test_quantized_layers_get_adapters_as_float_ones_do() -> None:
    quantized, plain = base_model(), LlamaForCausalLM(tiny_config())
    for model in (quantized, plain):
        add_adapter(model, LoraConfig())
    assert names_of(quantized, LoraLinear) == names_of(plain, LoraLinear)
    assert len(names_of(quantized, LoraLinear)) == 14


def test_a_fresh_adapter_changes_no_bit_of_the_logits() -> None:
    model = base_model()
    expected = logits(model)
    add_adapter(model, LoraConfig())
    assert_same(logits(model), expected)


def test_only_the_adapter_trains() -> None:
    model = base_model()
    add_adapter(model, LoraConfig(target_modules=["q_proj"]))
    assert trainable(model) == {
        f"model.layers.{i}.self_attn.q_proj.lora_{part}.default" for i in range(2) for part in "AB"
    }


def test_rank_and_alpha_patterns_reach_the_layers_by_their_names() -> None:
    model = base_model()
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 4})
    add_adapter(model, config)
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    assert (first.lora_A["default"].shape, first.scaling["default"]) == ((8, 64), 2)
    assert (second.lora_A["default"].shape, second.scaling["default"]) == ((2, 64), 8)
    assert model.model.layers[0].mlp.up_proj.scaling["default"] == 0.5


@by_wrapper
@pytest.mark.parametrize(
    "targets",
    ["all-linear", r"model\.layers\.0\..*_proj", ["model.layers.0.self_attn.q_proj", "0.mlp.up_proj"]],
    ids=str,
)
def test_a_wrapped_model_gets_the_adapters_of_the_plain_one(
    targets: str | list[str], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    config = LoraConfig(target_modules=targets, rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2})
    plain = base_model()
    wrapped = wrap(copy.deepcopy(plain))
    expected = logits(wrapped)
    for model in (plain, wrapped):
        torch.manual_seed(0)
        add_adapter(model, config)
        randomize_adapters(model)
    assert [(p.shape, p.requires_grad) for p in wrapped.parameters()] == [
        (p.shape, p.requires_grad) for p in plain.parameters()
    ]
    assert_same(logits(wrapped), logits(plain))
    delete_adapter(wrapped, "default")
    assert_same(logits(wrapped), expected)


def test_training_lowers_the_loss_and_leaves_the_base() -> None:
    model = base_model()
    before = state_bytes(model)
    add_adapter(model, LoraConfig(r=4, lora_dropout=0.1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    losses = []
    for step in range(12):
        model.train(step % 2 == 1)  # eval and train may alternate
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.8
    delete_adapter(model, "default")
    assert state_bytes(model) == before


def test_a_layer_in_several_places_has_one_adapter() -> None:
    model = TwoPlaces()
    plain = copy.deepcopy(model)
    add_adapter(model, LoraConfig())
    assert isinstance(model.first["a"], LoraLinear)
    assert model.first["b"] is model.first["a"]
    assert model.second["c"] is model.first["a"]
    assert len(trainable(model)) == 4
    delete_adapter(model, "default")
    assert repr(model) == repr(plain)
    assert model.second["c"] is model.first["b"] is model.first["a"]


@pytest.mark.parametrize("targets", ["all-linear", ["proj"]], ids=str)
def test_multihead_attention_is_left_alone(targets: str | list[str]) -> None:
    """PEFT wraps its out_proj, whose adapter then is never used."""
    model = WithAttention()
    add_adapter(model, LoraConfig(target_modules=targets))
    assert names_of(model, LoraLinear) == {"proj"}
    for training in (True, False):
        assert model.train(training)(torch.randn(2, 3, 64)).isfinite().all()


# --- set_adapter, delete_adapter ------------------------------------------------------------------------------------


@pytest.fixture
def two_adapters() -> LlamaForCausalLM:
    """Adapter "a" on q and v, "b" on v and up; "b" is active, as the last that was added."""
    model = base_model()
    add_adapter(model, LoraConfig(target_modules=["q_proj", "v_proj"]), "a")
    add_adapter(model, LoraConfig(r=3, target_modules=["v_proj", "up_proj"]), "b")
    randomize_adapters(model)
    return model


@pytest.mark.parametrize(
    ("chosen", "active"),
    [("a", ["a"]), ("b", ["b"]), (["a"], ["a"]), (["b", "a"], ["b", "a"]), ([], []), (None, [])],
    ids=str,
)
def test_set_adapter_chooses_what_counts_and_what_trains(
    chosen: str | list[str] | None, active: list[str], two_adapters: LlamaForCausalLM
) -> None:
    set_adapter(two_adapters, chosen)
    layer = two_adapters.model.layers[0]
    assert layer.self_attn.q_proj.active_adapters == [name for name in active if name == "a"]
    assert layer.self_attn.v_proj.active_adapters == active
    assert layer.mlp.up_proj.active_adapters == [name for name in active if name == "b"]
    assert len(trainable(two_adapters)) == 8 * len(active)
    assert {name.rsplit(".", 1)[-1] for name in trainable(two_adapters)} == set(active)


def test_active_adapters_add_up_and_none_is_the_base(two_adapters: LlamaForCausalLM) -> None:
    layer = two_adapters.model.layers[0].self_attn.v_proj
    x = torch.randn(3, 64)

    def update(names: str | list[str] | None) -> Tensor:
        set_adapter(two_adapters, names)
        return layer(x).detach() - layer.base_layer(x)

    assert not update(None).any()
    torch.testing.assert_close(update(["a", "b"]), update("a") + update("b"))


def test_switching_back_gives_the_same_bits(two_adapters: LlamaForCausalLM) -> None:
    by_b = logits(two_adapters)
    set_adapter(two_adapters, "a")
    assert (logits(two_adapters) != by_b).any()
    set_adapter(two_adapters, "b")
    assert_same(logits(two_adapters), by_b)


@pytest.mark.parametrize("names", ["c", ["a", "c"]], ids=str)
def test_set_adapter_names_the_unknown(names: str | list[str], two_adapters: LlamaForCausalLM) -> None:
    before = everything(two_adapters)
    with pytest.raises(ValueError, match=r"set_adapter.*name.*'a', 'b'.*'c'"):
        set_adapter(two_adapters, names)
    assert everything(two_adapters) == before


def test_deleting_the_last_adapter_restores_the_plain_layers() -> None:
    model = base_model()
    before, expected = everything(model)[:2], logits(model)
    layers = {name: model.get_submodule(name) for name in names_of(model, Linear4bit)}
    add_adapter(model, LoraConfig())
    randomize_adapters(model)
    delete_adapter(model, "default")
    assert everything(model)[:2] == before  # not what trains: all stays frozen
    assert_same(logits(model), expected)
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())


@pytest.mark.parametrize("active", ["a", ["a", "b"]], ids=str)
def test_deleting_one_adapter_leaves_the_other(active: str | list[str], two_adapters: LlamaForCausalLM) -> None:
    set_adapter(two_adapters, "a")
    by_a = logits(two_adapters)
    set_adapter(two_adapters, active)
    delete_adapter(two_adapters, "b")
    assert names_of(two_adapters, LoraLinear) == {
        f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qv"
    }
    assert_same(logits(two_adapters), by_a)
    assert not any(name.endswith(".b") for name in two_adapters.state_dict())


def test_deleting_the_active_adapter_activates_the_first_that_is_left(two_adapters: LlamaForCausalLM) -> None:
    add_adapter(two_adapters, LoraConfig(), "A")  # the first by name, the last by age
    randomize_adapters(two_adapters)
    by_first, trained = logits(two_adapters), trainable(two_adapters)
    set_adapter(two_adapters, "b")
    with pytest.warns(UserWarning, match="delete_adapter: 'b' was active: now 'A' is") as told:
        delete_adapter(two_adapters, "b")
    assert told[0].filename == __file__
    assert_same(logits(two_adapters), by_first)
    assert trainable(two_adapters) == trained


def test_deleting_while_none_is_active_activates_none(two_adapters: LlamaForCausalLM) -> None:
    set_adapter(two_adapters, None)
    delete_adapter(two_adapters, "b")
    assert not trainable(two_adapters)


def test_delete_adapter_names_the_unknown(two_adapters: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"delete_adapter.*name.*'a', 'b'.*'c'"):
        delete_adapter(two_adapters, "c")


def test_state_dict_round_trip(two_adapters: LlamaForCausalLM) -> None:
    other = copy.deepcopy(two_adapters)
    randomize_adapters(other)
    assert state_bytes(other) != state_bytes(two_adapters)
    other.load_state_dict(two_adapters.state_dict(), strict=True)
    assert state_bytes(other) == state_bytes(two_adapters)
    assert_same(logits(other), logits(two_adapters))
