"""Errors say what can be done about them, in words that fit the case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn

from qlora_ext import (
    Linear4bit,
    LoraConfig,
    LoraLinear,
    add_adapter,
    delete_adapter,
    load_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
)

TAKE_OFF = r", accelerate's \(accelerate\.hooks\.remove_hook_from_submodules\(model\) takes them off\)$"


def adapted(**options: Any) -> nn.ModuleDict:
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)})
    add_adapter(model, LoraConfig(**{"r": 2} | options))
    return model


@pytest.mark.parametrize("call", [add_adapter, lambda m, config: m["up"].add_adapter("default", config)])
def test_a_name_that_is_taken(call: Callable[[nn.Module, LoraConfig], None]) -> None:
    expected = r"a name that no adapter has yet \(delete_adapter it first, or take another\)"
    with pytest.raises(ValueError, match=rf": name: expected {expected}, got 'default'$"):
        call(adapted(), LoraConfig())


@pytest.mark.parametrize(
    ("saved", "own", "at", "has", "got"),
    [
        ({"r": 4}, {}, "down", "has rank 4", "has rank 2"),
        ({}, {"target_modules": ["down"]}, "up", "has rank 2", "is not on this layer"),
        ({"target_modules": ["down"]}, {}, "up", "is not on this layer", "has rank 2"),
    ],
    ids=["rank", "more", "fewer"],
)
def test_an_adapter_that_does_not_fit_that_of_its_name(
    saved: dict[str, Any], own: dict[str, Any], at: str, has: str, got: str, tmp_path: Path
) -> None:
    save_adapter(adapted(**saved), tmp_path)
    model = adapted(**own)
    remedy = r"\(delete_adapter it first, or load under another name\)"
    expected = f"the model's adapter 'default' to be as the file's, which {has}"
    with pytest.raises(
        ValueError, match=f"^load_adapter: name: {at}: expected {expected}, got one that {got} {remedy}$"
    ):
        load_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "another")
    with pytest.warns(UserWarning, match="'another' was active"):
        delete_adapter(model, "another")
    delete_adapter(model, "default")
    load_adapter(model, tmp_path)


def test_an_adapter_that_is_only_there_as_a_pickle(tmp_path: Path) -> None:
    model = nn.ModuleDict({"up": nn.Linear(64, 64)})
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"]))
    theirs.save_pretrained(str(tmp_path), safe_serialization=False)
    got = r"only adapter_model\.bin, a pickle, which is not read \(PEFT's save_pretrained writes safetensors\)"
    with pytest.raises(FileNotFoundError, match=rf"expected a safetensors file, got {got}$"):
        load_adapter(adapted(), tmp_path, "theirs")
    theirs.save_pretrained(str(tmp_path))
    load_adapter(adapted(), tmp_path, "theirs")


NEED_ONE: dict[str, Callable[[nn.Module, Path], object]] = {
    "set_adapter": lambda model, _: set_adapter(model, "default"),
    "delete_adapter": lambda model, _: delete_adapter(model, "default"),
    "save_adapter": save_adapter,
}


@pytest.mark.parametrize("name", NEED_ONE)
def test_a_model_without_adapters(name: str, tmp_path: Path) -> None:
    model = adapted()
    delete_adapter(model, "default")
    expected = r"expected one with adapters \(of add_adapter, load_adapter\), got one without"
    with pytest.raises(ValueError, match=rf"^{name}: model: {expected}$"):
        NEED_ONE[name](model, tmp_path)
    assert not list(tmp_path.iterdir())


def without_adapters() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64))


def with_adapters(*, quantized: bool = False) -> nn.Module:
    model = without_adapters()
    add_adapter(quantize_model(model) if quantized else model, LoraConfig())
    return model


HOOKED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "quantize": (without_adapters, quantize_model),
    "delete": (with_adapters, lambda model: delete_adapter(model, "default")),
    "merge": (with_adapters, merge_adapter),
    "dequantize": (lambda: with_adapters(quantized=True), lambda model: merge_adapter(model, dequantize=True)),
}


@pytest.mark.parametrize(("build", "call"), HOOKED.values(), ids=HOOKED)
def test_accelerates_hooks_are_named_and_taken_off(
    build: Callable[[], nn.Module], call: Callable[[nn.Module], object]
) -> None:
    model = build()
    for module in [m for m in model.modules() if isinstance(m, (nn.Linear, Linear4bit, LoraLinear))]:
        add_hook_to_module(module, ModelHook())
    with pytest.raises((TypeError, ValueError), match=rf"(?s)0: .*(forward|hooks).*{TAKE_OFF}"):
        call(model)
    remove_hook_from_submodules(model)
    call(model)


def test_other_hooks_are_not_taken_for_accelerates() -> None:
    model = without_adapters()
    model[0].register_forward_hook(print)
    with pytest.raises(ValueError, match=r"got a layer that has them$"):
        quantize_model(model)
