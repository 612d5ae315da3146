"""add_adapter refuses what it cannot do, by name, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_model import base_model, everything
from random_layers import WithAttention
from torch import nn

from qlora_ext import LoraConfig, add_adapter, load_adapter, quantize_model, save_adapter

UNKNOWN = {
    "one-of-several": (["q_proj", "qkv_proj"], "'qkv_proj'"),
    "part-of-a-name": (["proj"], "'proj'"),
    "norm": (["input_layernorm"], "'input_layernorm'"),
    "regex": (r".*\.attention\..*", r"'\.\*\\\\\.attention"),
    "regex-of-a-part": ("q_proj", "'q_proj'"),
    "regex-of-a-beginning": (r".*\.q_pro", r"'\.\*\\\\\.q_pro'"),
}


@pytest.mark.parametrize(("targets", "named"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_target_is_named_and_changes_nothing(targets: str | list[str], named: str) -> None:
    model = base_model()
    before = everything(model)
    with pytest.raises(ValueError, match=rf"add_adapter.*target_modules.*q_proj.*{named}"):
        add_adapter(model, LoraConfig(target_modules=targets))
    assert everything(model) == before


def test_each_last_part_is_told_once() -> None:
    expected = r"last parts: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj\), got"
    with pytest.raises(ValueError, match=expected):
        add_adapter(base_model(), LoraConfig(target_modules=["proj"]))


def test_what_is_inside_of_attention_or_of_an_adapted_layer_is_no_target() -> None:
    model = WithAttention()
    add_adapter(model, LoraConfig(), "first")
    for inside in ("out_proj", "base_layer"):
        with pytest.raises(
            ValueError, match=rf"add_adapter: target_modules: .*, not within MultiheadAttention, got \['{inside}'\]"
        ):
            add_adapter(model, LoraConfig(target_modules=[inside]), "second")


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Linear(64, 8)], ids=["none", "itself"])
def test_all_linear_on_a_model_without_linear_layers_in_it(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"target_modules: expected an nn\.Linear .*none\), got 'all-linear'"):
        add_adapter(model, LoraConfig())


def test_an_adapter_name_is_used_once() -> None:
    model = base_model()
    add_adapter(model, LoraConfig(), "a")
    before = everything(model)
    with pytest.raises(ValueError, match=r"add_adapter.*name.*'a'"):
        add_adapter(model, LoraConfig(target_modules=["q_proj"]), "a")
    assert everything(model) == before


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name-empty": ({"name": ""}, ValueError, "name: expected.*''"),
    "name-with-dot": ({"name": "a.b"}, ValueError, "name: expected.*'a.b'"),
    "name-of-a-method": ({"name": "keys"}, ValueError, "name: expected.*'keys'"),
    "name-of-an-attribute": ({"name": "training"}, ValueError, "name: expected.*'training'"),
    "name-type": ({"name": 1}, TypeError, "name: expected a str, got 1"),
    "config-dict": ({"config": {"r": 8}}, TypeError, "config: expected a qlora_ext.LoraConfig, got .*dict"),
    "config-of-peft": ({"config": peft.LoraConfig()}, TypeError, "config: expected a qlora_ext.LoraConfig, got .*peft"),
    "rank-pattern": ({"config": LoraConfig(rank_pattern={"q_proj": 4, "q": 2})}, ValueError, "rank_pattern.*got 'q'"),
    "alpha-pattern": ({"config": LoraConfig(alpha_pattern={"lm_head": 4})}, ValueError, "alpha_pattern.*'lm_head'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_and_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = base_model()
    before = everything(model)
    with pytest.raises(error, match=f"add_adapter: {message}"):
        add_adapter(model, **({"config": LoraConfig()} | arguments))
    assert everything(model) == before


@pytest.mark.parametrize("other", [False, True])
def test_an_adapter_that_memory_does_not_hold_is_nowhere(other: bool) -> None:
    model = base_model()
    if other:
        add_adapter(model, LoraConfig(r=2), "other")
    before = everything(model)
    with pytest.raises(RuntimeError, match="memory"):
        add_adapter(model, LoraConfig(rank_pattern={"down_proj": 10**12}), "large")
    assert everything(model) == before
    add_adapter(model, LoraConfig(), "large")


def test_layers_without_a_shape_yet_are_refused_before_anything_changes(tmp_path: Path) -> None:
    add_adapter(adapted := nn.Sequential(nn.Linear(64, 64)), LoraConfig())
    save_adapter(adapted, tmp_path)
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(8))
    for call in (
        quantize_model,
        lambda m: add_adapter(m, LoraConfig(target_modules=["0"])),
        lambda m: load_adapter(m, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"model: 1\.weight: expected parameters that have their shape"):
            call(model)
        assert [type(layer) for layer in model] == [nn.Linear, nn.LazyLinear]
    model(torch.ones(1, 64))
    add_adapter(quantize_model(model), LoraConfig())
    assert model(torch.ones(1, 64)).shape == (1, 8)
