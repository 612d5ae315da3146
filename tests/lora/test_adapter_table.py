"""Tables whose tensors are computed from others, by torch.nn.utils.parametrize."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from adapted_model import trainable
from random_layers import BASES, make_base, make_lora, state_bytes
from reference import assert_same
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from qlora_ext import LoraConfig, LoraLinear, add_adapter, delete_adapter, load_adapter, save_adapter, set_adapter


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2


def parametrized(base: str) -> nn.Sequential:
    """Adapters a0 and a1, A of a1 being twice its parameter; both active."""
    layer = make_lora(make_base(base), LoraConfig(r=2), LoraConfig(r=2))
    layer.base_layer.requires_grad_(False)
    register_parametrization(layer.lora_A, "a1", Doubled())
    return nn.Sequential(layer)


TRAINED = {"a0": {"0.lora_A.a0", "0.lora_B.a0"}, "a1": {"0.lora_A.parametrizations.a1.original", "0.lora_B.a1"}}


@pytest.mark.parametrize("base", BASES)
def test_what_a_parametrized_adapter_is_made_of_is_what_trains(base: str) -> None:
    model = parametrized(base)
    for name in ("a0", "a1", "a0", None, "a1"):
        set_adapter(model, name)
        assert trainable(model) == TRAINED.get(name, set())
    model(torch.ones(1, 256)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("base", BASES)
def test_a_parametrized_adapter_is_frozen_without_a_word_and_never_cast(base: str) -> None:
    model = parametrized(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(model, LoraConfig(), "other")
    assert trainable(model) == {"0.lora_A.other", "0.lora_B.other"}
    model.bfloat16()
    assert isinstance(model[0], LoraLinear)
    assert model[0].lora_A["a1"].dtype == torch.float32


@pytest.mark.parametrize("base", BASES)
def test_a_parametrized_adapter_is_saved_but_not_loaded_into(base: str, tmp_path: Path) -> None:
    model = parametrized(base)
    save_adapter(model, tmp_path, "a1")
    before = state_bytes(model)
    with pytest.raises(ValueError, match=r"load_adapter: model: 0\.lora_A\.a1: expected a parameter, got one with a"):
        load_adapter(model, tmp_path, "a1")
    assert state_bytes(model) == before
    load_adapter(model, tmp_path, "again")
    assert_same(model[0].lora_A["again"], model[0].lora_A["a1"])


@pytest.mark.parametrize("base", BASES)
def test_what_a_parametrization_keeps_in_buffers_is_not_cast_either(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(r=2))
    spectral_norm(layer.lora_A, "a0")
    layer.bfloat16()
    assert {tensor.dtype for tensor in (*layer.lora_A.parameters(), *layer.lora_A.buffers())} == {torch.float32}
    layer(torch.ones(1, 256, dtype=torch.bfloat16)).sum().backward()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.count = nn.Parameter(torch.tensor(2), requires_grad=False)

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * self.factor * self.count


def test_what_adapters_share_trains_while_one_is_active() -> None:
    layer = make_lora(make_base(BASES[0]), LoraConfig(r=2), LoraConfig(r=2))
    shared = Shared()
    for name in ("a0", "a1"):
        register_parametrization(layer.lora_A, name, shared)
    for active, trains in (("a0", True), (None, False), ("a1", True)):
        set_adapter(nn.Sequential(layer), active)
        assert shared.factor.requires_grad is trains
        assert not shared.count.requires_grad


def test_a_parametrized_adapter_is_deleted_whole() -> None:
    model = parametrized(BASES[0])
    delete_adapter(model, "a1")
    assert set(model.state_dict()) == {"0.base_layer.weight", "0.base_layer.bias", "0.lora_A.a0", "0.lora_B.a0"}


def test_an_adapter_may_have_the_name_of_no_attribute_of_a_table() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    for name in ("default", "leaves"):
        add_adapter(model, LoraConfig(r=2), name)
    assert set(model[0].lora_A.keys()) == set(model[0].lora_B.keys()) == {"default", "leaves"}
    with pytest.raises(ValueError, match="add_adapter: name: expected a new adapter name"):
        add_adapter(model, LoraConfig(r=2), "keys")


def test_hooks_are_not_lost_with_the_last_adapter() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for name in ("a", "b"):
        add_adapter(model, LoraConfig(r=2), name)
    seen: list[str] = []
    hook = model[1].register_forward_hook(lambda *_: seen.append("1"))
    delete_adapter(model, "a")
    with pytest.raises(
        ValueError, match=r"delete_adapter: 1: expected no hooks, .* would be lost, got a layer that has them"
    ):
        delete_adapter(model, "b")
    assert all(isinstance(layer, LoraLinear) for layer in model)
    model(torch.randn(2, 64))
    assert seen == ["1"]
    hook.remove()
    delete_adapter(model, "b")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
