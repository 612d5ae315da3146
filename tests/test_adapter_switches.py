"""Switching and deleting adapters where something else looks at them, too."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from qlora_ext import LoraConfig, add_adapter, delete_adapter, set_adapter

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
