"""A model that computes while another thread switches, merges or saves it: each result is of one choice of adapters."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import BASES, make_base, make_lora, state_bytes
from reference import assert_same
from torch import Tensor, nn

from qlora_ext import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    load_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
)

by_base = pytest.mark.parametrize("base", BASES)
X = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))


def merged_model(base: str) -> nn.Sequential:
    model = nn.Sequential(make_lora(make_base(base), LoraConfig()))
    merge_adapter(model)
    return model


@by_base
def test_a_merged_layer_stays_merged_while_its_state_dict_is_taken(base: str) -> None:
    model = merged_model(base)
    expected, merged = model(X), model[0].merged_base
    seen: list[Tensor] = []
    for each in (model[0], model[0].base_layer, model[0].lora_A):
        each.register_state_dict_pre_hook(lambda *_: seen.append(model(X)))
        each.register_state_dict_post_hook(lambda *_: seen.append(model(X)))
    state = model.state_dict()
    assert not any("merged" in name for name in state)
    assert len(seen) == 6
    for y in seen:
        assert_same(y, expected)
    assert model[0].merged_base is merged


def test_a_merge_that_is_interrupted_leaves_nothing_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(make_lora(make_base("Linear4bit"), LoraConfig()) for _ in range(3)))
    merge = LoraLinear.merge
    merged: list[LoraLinear] = []

    def interrupted(layer: LoraLinear, *weight: Tensor) -> None:
        if len(merged) == 2:
            raise KeyboardInterrupt
        merge(layer, *weight)
        merged.append(layer)

    monkeypatch.setattr(LoraLinear, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(model)
    assert len(merged) == 2
    assert not any(layer.merged for layer in model)


def test_two_threads_that_take_the_state_dict_do_not_lose_the_merge() -> None:
    model = merged_model("Linear4bit")
    expected, meet = model(X), threading.Barrier(2, timeout=20)
    model[0].base_layer.register_state_dict_pre_hook(lambda *_: meet.wait())  # both are inside state_dict then
    threads = [threading.Thread(target=model.state_dict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model[0].merged
    assert_same(model(X), expected)


class Watched(LoraLinear):
    """Counts how often what another thread may exchange is looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("merged_base", "active_adapters"):
            self.__dict__.setdefault("looks", Counter())[name] += 1
        return super().__getattribute__(name)


@by_base
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_forward_looks_once_at_what_another_thread_may_exchange(merged: bool, hooked: bool, base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(lora_dropout=0.5), LoraConfig(r=3))
    layer.__class__ = Watched
    if merged:
        layer.merge()
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    layer.__dict__["looks"] = looks = Counter()
    layer(X)
    assert looks == {"merged_base": 1, "active_adapters": 1}


class Interrupted(dict[str, Any]):
    """A table of a layer at each look at which another thread activates other adapters."""

    def __init__(self, layer: LoraLinear, table: dict[str, Any]) -> None:
        super().__init__(table)
        self.layer = layer

    def __getitem__(self, name: str) -> Any:
        self.layer.active_adapters = ["a1"] if self.layer.active_adapters == ["a0"] else ["a0"]
        return super().__getitem__(name)


@by_base
def test_a_switch_in_the_midst_of_a_forward_mixes_nothing(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(r=4), LoraConfig(r=8, lora_alpha=3))
    expected = {}
    for name in ("a0", "a1"):
        layer.active_adapters = [name]
        expected[name] = layer(X)
    layer.scaling, layer.configs = Interrupted(layer, layer.scaling), Interrupted(layer, layer.configs)
    for name in ("a0", "a1"):
        layer.active_adapters = [name]
        assert_same(layer(X), expected[name])


def test_a_switch_that_fails_switches_no_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name in ("a", "b"):
        add_adapter(model, LoraConfig(r=2), name)
    with torch.inference_mode():
        model[1].lora_A["a"] = nn.Parameter(torch.zeros(2, 8))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"set_adapter: model: 1: .*got inference tensors: a"):
        set_adapter(model, "a")
    assert [layer.active_adapters for layer in model] == [["b"], ["b"]]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@by_base
def test_a_merged_layer_has_the_bias_that_its_base_has(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig())
    layer.merge()
    other = torch.arange(48.0)
    expected = layer(X) - layer.bias + other
    torch.testing.assert_close(torch.func.functional_call(layer, {"base_layer.bias": other}, (X,)), expected)
    layer.bias = nn.Parameter(other, requires_grad=False)
    torch.testing.assert_close(layer(X), expected)


def test_applying_to_a_layer_alone_leaves_what_is_merged() -> None:
    layer = make_lora(make_base(BASES[0]), LoraConfig())
    layer.merge()
    expected = layer(X)
    layer._apply(torch.zeros_like, recurse=False)
    assert_same(layer(X), expected)


def test_what_is_made_in_inference_mode_trains_like_others(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.inference_mode():
        quantize_model(model)
        add_adapter(model, LoraConfig(r=2), "made")
        save_adapter(model, tmp_path, "made")
        load_adapter(model, tmp_path, "loaded")
    for name in ("made", "loaded"):
        set_adapter(model, name)
        model(torch.ones(1, 64)).sum().backward()
        assert model[0].lora_B[name].grad is not None


MERGES: dict[str, Callable[[nn.Sequential], object]] = {
    "merge_adapter": merge_adapter,
    "dequantize": partial(merge_adapter, dequantize=True),
    "layer": lambda model: model[0].merge(model[0].merged_weight()),
}


@by_base
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_what_is_merged_in_inference_mode_is_trained_through(
    base: str, merge: Callable[[nn.Sequential], object]
) -> None:
    model = nn.Sequential(make_lora(make_base(base), LoraConfig()))
    with torch.inference_mode():
        merge(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        model.load_state_dict(model.state_dict())
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (2 if self.training else 1)


@by_base
def test_the_merged_layer_goes_where_its_layer_goes(base: str) -> None:
    """It is no child, so nn.Module does not see to it."""
    model = merged_model(base)
    expected = model(X)
    assert not any("merged" in name for name, _ in [*model.named_parameters(), *model.named_modules()])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(twin(X), expected)
        assert twin[0].merged_base is not model[0].merged_base
        assert twin[0].merged_base.bias is twin[0].base_layer.bias
        twin[0].unmerge()
        assert state_bytes(twin) == state_bytes(model)
    assert model.to(torch.bfloat16)(X.bfloat16()).dtype == torch.bfloat16
    assert model[0].merged_base.bias.dtype == torch.bfloat16
    model.to_empty(device="meta")
    assert model(X.to("meta", torch.bfloat16)).is_meta


def test_train_and_eval_reach_the_merged_layer() -> None:
    layer = make_lora(Noisy(256, 48), LoraConfig())
    layer.merge()
    y = layer(X)
    torch.testing.assert_close(layer.eval()(X) * 2, y)
    assert_same(layer.train()(X), y)


@by_base
def test_a_merged_model_is_exported(base: str) -> None:
    model = merged_model(base).eval()
    program = torch.export.export(model, (X,))
    assert_same(program.module()(X), model(X))
