"""Switching, deleting and copying adapters where something else looks at them, too."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from random_layers import randomize_adapters
from torch import nn

from qlora_ext import LoraConfig, add_adapter, delete_adapter, load_adapter, quantize_model, save_adapter, set_adapter

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def test_a_warning_that_is_an_error_leaves_nothing_half_done() -> None:
    model = two_layers()
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "first")
    model[1].weight.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="trained beside another adapter, now frozen"):
            add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "second")
    assert model[0].active_adapters == ["second"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_A.second", "0.lora_B.second"]


def test_a_forward_in_the_place_of_its_class_is_not_lost() -> None:
    model = two_layers()
    add_adapter(model, LoraConfig(r=2))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    before = model(X)
    with pytest.raises(ValueError, match=r"^delete_adapter: 0: expected no hooks, and its class's forward"):
        delete_adapter(model, "default")
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("active", ["a", "b"])
def test_what_adapters_of_several_layers_share_trains_if_one_is_active(active: str) -> None:
    model = two_layers()
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "a")
    add_adapter(model, LoraConfig(r=2, target_modules=["1"]), "b")
    model[1].lora_A["b"] = model[0].lora_A["a"]
    set_adapter(model, active)
    assert model[0].lora_A["a"].requires_grad
    set_adapter(model, None)
    assert not model[0].lora_A["a"].requires_grad


def test_deleting_one_of_two_active_adapters_leaves_the_other_active() -> None:
    model = two_layers()
    for name in ("a", "b", "c"):
        add_adapter(model, LoraConfig(r=2), name)
    set_adapter(model, ["b", "c"])
    delete_adapter(model, "c")
    assert model[0].active_adapters == model[1].active_adapters == ["b"]


def test_deleting_is_refused_before_it_begins_if_the_next_adapter_cannot_train() -> None:
    model = two_layers()
    for name in ("a", "b"):
        add_adapter(model, LoraConfig(r=2), name)
    with torch.inference_mode():
        model[1].lora_A["a"] = nn.Parameter(torch.zeros(2, 64))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^delete_adapter: model: 1: .*got inference tensors: a"):
        delete_adapter(model, "b")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model[0].active_adapters == model[1].active_adapters == ["b"]
    delete_adapter(model, "a")
    assert model[0].active_adapters == ["b"]


def test_loading_into_inference_tensors_is_refused_before_it_begins(tmp_path: Path) -> None:
    model = two_layers()
    add_adapter(model, LoraConfig(r=2))
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    randomize_adapters(model)
    with torch.inference_mode():
        model[1].lora_A["default"] = nn.Parameter(torch.zeros(2, 64))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^load_adapter: model: 1: .*got inference tensors: default"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_reference_model_shares_what_is_frozen() -> None:
    """By the README's recipe for TRL."""
    model = quantize_model(two_layers())
    add_adapter(model, LoraConfig(r=2))
    randomize_adapters(model)
    frozen = {id(t): t for t in [*model.parameters(), *model.buffers()] if not t.requires_grad}
    ref_model = copy.deepcopy(model, frozen)
    before = ref_model(X)
    randomize_adapters(model)
    assert torch.equal(ref_model(X), before)
    assert not torch.equal(model(X), before)
    theirs = dict(model.named_parameters())
    shared = {name for name, p in ref_model.named_parameters() if p is theirs[name]}
    assert shared == {name for name, p in theirs.items() if not p.requires_grad}
    assert len(shared) == 6  # weight, absmax and bias of each layer
