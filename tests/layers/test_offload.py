"""Models with adapters whose tensors accelerate offloads: to the CPU, to disk, or by a device map."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import remove_hook_from_submodules
from mixtures import BOTH, TOKENS
from mixtures import adapted as adapted_mixture
from packaging.version import Version
from random_layers import BASES, make_base, make_lora, state_bytes
from reference import assert_same
from safetensors.torch import save_model
from torch import nn

from qlora_ext import (
    Linear4bit,
    LoraConfig,
    LoraLinear,
    add_adapter,
    delete_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
)

CPU = torch.device("cpu")
X = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
by_base = pytest.mark.parametrize("base", BASES)

OFFLOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "cpu": lambda model, _: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "map": lambda model, folder: dispatch_model(
        model, {"0": "cpu", "1": "cpu", "2": "disk"}, main_device="cpu", offload_dir=folder
    ),
}
by_offload = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)


def adapted(base: str = "Linear4bit") -> nn.Sequential:
    """Two layers with the adapters "a0" and "a1", both active."""
    configs = LoraConfig(), LoraConfig(r=3)
    bases = [make_base(base, in_features).requires_grad_(False) for in_features in (256, 48)]
    return nn.Sequential(make_lora(bases[0], *configs), nn.ReLU(), make_lora(bases[1], *configs)).eval()


@by_base
@by_offload
def test_an_offloaded_model_computes_the_same(
    offload: Callable[[nn.Module, Path], object], base: str, tmp_path: Path
) -> None:
    """With a 4-bit base one by one, as beside other hooks, not in one op."""
    model = adapted(base)
    state, on_its_own = state_bytes(model), model(X)
    offload(model, tmp_path)
    assert model[2].lora_A["a0"].is_meta
    for _ in range(2):
        torch.testing.assert_close(model(X), on_its_own)
    set_adapter(model, "a1")
    switched = model(X)
    assert not torch.allclose(switched, on_its_own)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(model(X), switched)
    assert state_bytes(model) == state


@by_base
@by_offload
def test_a_merged_model_is_offloaded(offload: Callable[[nn.Module, Path], object], base: str, tmp_path: Path) -> None:
    model = adapted(base)
    merge_adapter(model)
    expected = model(X)
    offload(model, tmp_path)
    assert_same(model(X), expected)


@by_base
@by_offload
def test_an_offloaded_adapter_is_saved(offload: Callable[[nn.Module, Path], object], base: str, tmp_path: Path) -> None:
    model = adapted(base)
    save_adapter(model, tmp_path / "before", "a1")
    offload(model, tmp_path / "offloaded")
    save_adapter(model, tmp_path / "after", "a1")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


def test_what_is_on_meta_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_adapter: model: 0\.lora_A\.a0: expected a tensor with values.*meta"):
        save_adapter(adapted().to("meta"), tmp_path, "a0")
    model = adapted()
    model.append(nn.Linear(48, 3))
    cpu_offload(model, execution_device=CPU)
    model[3].weight.requires_grad_()
    with pytest.raises(ValueError, match=r"save_adapter: model: 3\.weight: expected a tensor with values.*meta"):
        save_adapter(model, tmp_path, "a0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adapters", [0, 1])
@by_base
def test_no_adapter_for_an_offloaded_layer(base: str, adapters: int) -> None:
    """Its tensors would be on meta as the base's, and no hook would ever give them values."""
    model = nn.Sequential(make_base(base), nn.ReLU(), make_base(base, in_features=48))
    if adapters:
        add_adapter(model, LoraConfig(), "first")
    cpu_offload(model[2], execution_device=CPU)
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=r"add_adapter: model: 2: .*before accelerate's dispatch.*got one on meta"):
        add_adapter(model, LoraConfig())
    assert list(model.state_dict()) == state


@by_base
def test_an_adapter_on_another_device_than_x_is_named(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig())
    layer.lora_B.to("meta")
    with pytest.raises(ValueError, match=r"(lora_B\.a0|lora_linear_4bit: B): expected device cpu, got meta"):
        layer(X)


@by_base
def test_an_adapter_without_values_is_not_merged(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(), LoraConfig())
    layer.lora_A["a1"] = layer.lora_A["a1"].to("meta")
    with pytest.raises(ValueError, match=r"lora_A\.a1: expected device cpu, got meta"):
        layer.merge()


def test_adapters_stay_the_same_while_some_are_offloaded() -> None:
    model = nn.Sequential(nn.Linear(48, 48))
    add_adapter(model, LoraConfig())
    cpu_offload(model[0].lora_B, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"add_adapter: model: 0: .*got one on meta"):
        add_adapter(model, LoraConfig(), "second")
    with pytest.raises(ValueError, match=r"delete_adapter: model: 0: .*got one on meta"):
        delete_adapter(model, "default")
    assert model[0].configs.keys() == {"default"}


@by_base
def test_x_goes_where_the_base_computes(base: str) -> None:
    """meta in the place of a GPU: cpu_offload puts no hook on a layer that has no tensors but its children's."""
    layer = make_lora(make_base(base), LoraConfig(lora_dropout=0.5))
    cpu_offload(layer, execution_device=torch.device("meta"))
    layer.forward = layer._old_forward
    assert layer(X).device.type == "meta"


def test_removed_hooks_leave_a_layer_as_it_was() -> None:
    """They leave a forward bound to the layer itself."""
    model = nn.Sequential(nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 48))
    cpu_offload(model, execution_device=CPU)
    remove_hook_from_submodules(model)
    assert "forward" in model[0].__dict__
    quantize_model(model)


@pytest.mark.parametrize("dequantize", [False, True])
@by_base
def test_a_layer_without_its_hooks_is_merged(base: str, dequantize: bool) -> None:
    model, other = adapted(base), adapted(base)
    other.load_state_dict(model.state_dict())
    cpu_offload(model, execution_device=CPU)
    with pytest.raises((TypeError, ValueError), match=r"merge_adapter: 0: .*its class"):
        merge_adapter(model, dequantize=dequantize)
    remove_hook_from_submodules(model)
    for each in (model, other):
        merge_adapter(each, dequantize=dequantize)
    assert_same(model(X), other(X))
    assert isinstance(model[0], LoraLinear) != dequantize


def test_what_is_offloaded_with_its_module_is_left_alone() -> None:
    model = adapted_mixture("mixtral")
    expected = model(TOKENS).logits
    cpu_offload(model, execution_device=CPU, preload_module_classes=["MixtralExperts"])
    for call in (
        lambda: add_adapter(model, LoraConfig(target_modules=[], target_parameters=BOTH), "two"),
        lambda: delete_adapter(model, "default"),
        lambda: merge_adapter(model),
    ):
        with pytest.raises(ValueError, match=r"_adapter: model: model\.layers\.0\..*: expected a layer in memory"):
            call()
    torch.testing.assert_close(model(TOKENS).logits, expected)


@pytest.mark.parametrize("offload_buffers", [True, False])
def test_scales_that_accelerate_does_not_load_are_not_zeros(offload_buffers: bool, tmp_path: Path) -> None:
    """From 1.16 on it loads them."""
    model = nn.Sequential(make_base("Linear4bit"), make_base("Linear4bit", 48))
    save_model(model, str(tmp_path / "model.safetensors"))
    with init_empty_weights():
        empty = nn.Sequential(Linear4bit(256, 48), Linear4bit(48, 48))
    devices, folder = {"0": "cpu", "1": "disk"}, str(tmp_path / "offloaded")
    load_checkpoint_and_dispatch(empty, str(tmp_path), devices, offload_folder=folder, offload_buffers=offload_buffers)
    if offload_buffers or Version(version("accelerate")) >= Version("1.16"):
        assert_same(empty(X), model(X))
    else:
        assert empty(X).isnan().all()
