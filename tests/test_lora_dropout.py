"""Dropout before the adapters of a LoraLinear: who decides about it, and its masks. Its gradients are tested in
test_lora.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from layers import BASES, make_base, make_lora
from reference import assert_same
from torch import Tensor, nn

from qlora_ext import _C, LoraConfig, add_adapter, load_adapter, save_adapter

dropout_mask = torch.ops.qlora_ext.dropout_mask
by_base = pytest.mark.parametrize("base", BASES)


@by_base
def test_dropout_keeps_the_mean(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(r=4, lora_dropout=0.3))
    x = torch.randn(256)
    draws = layer(x.expand(10_000, 256)).detach() - layer.base_layer(x).detach()
    expected = layer.eval()(x) - layer.base_layer(x)
    assert draws.std(0).min() > 0
    # 48 means, each with a deviation of std / 100: five of these are passed once in 35 000 seeds.
    assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 100).all()


@by_base
def test_eval_has_no_dropout(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(lora_dropout=0.5))
    without = make_lora(layer.base_layer, LoraConfig())
    without.load_state_dict(layer.state_dict())
    x = torch.randn(3, 256)
    assert (layer(x) != without(x)).any()
    layer.eval()
    assert_same(layer(x), without(x))
    layer.train()
    assert (layer(x) != without(x)).any()


@by_base
def test_dropout_of_one_adapter_does_not_reach_another(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(), LoraConfig(lora_dropout=0.9))
    nn.init.zeros_(layer.lora_B["a1"])
    x = torch.randn(3, 256)
    y = layer(x)
    layer.active_adapters = ["a0"]
    torch.testing.assert_close(y, layer(x))


@by_base
def test_it_obeys_what_is_set_on_dropout_modules(base: str) -> None:
    """As TRL's disable_dropout has it, and who puts all dropout of a model in training to eval."""
    layer = make_lora(make_base(base), LoraConfig(lora_dropout=0.5), LoraConfig())
    x = torch.randn(3, 256)
    without = layer.eval()(x)
    dropout = layer.train().lora_dropout["a0"]
    assert (layer(x) != without).any()
    dropout.eval()
    assert_same(layer(x), without)
    layer.eval()
    dropout.train()  # as Monte Carlo dropout has it
    assert (layer(x) != without).any()
    dropout.p = 0.0
    assert_same(layer(x), without)
    dropout.p = 1.0
    layer.active_adapters = ["a1"]
    other = layer(x)
    layer.active_adapters = ["a0", "a1"]
    torch.testing.assert_close(layer(x), other)
    layer.lora_dropout["a0"] = nn.Identity()  # in the place of all dropout, as for serving
    assert_same(layer(x), without)
    layer.lora_dropout["a0"] = nn.Sequential(nn.Dropout(0.5))  # is not called: what it would do is not known
    with pytest.raises(AttributeError, match="'p'"):
        layer(x)
    layer.delete_adapter("a0")
    assert [type(m) for m in layer.lora_dropout.modules() if m is not layer.lora_dropout] == [nn.Dropout]


def test_a_new_adapter_and_a_loaded_one_drop_as_their_config_says(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 48)).eval()
    add_adapter(model, LoraConfig(lora_dropout=0.5))
    dropout = model[0].lora_dropout["default"]
    assert (dropout.p, dropout.training) == (0.5, False)
    save_adapter(model, tmp_path)
    dropout.p = 0.0
    load_adapter(model, tmp_path)
    assert model[0].lora_dropout["default"].p == 0.5


def seeded_mask(x: Tensor, keep: float) -> Tensor:
    torch.manual_seed(7)
    return dropout_mask(x, keep)


@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (2, 5, 100), (300, 512)], ids=str)
def test_a_seed_stands_for_the_same_masks_on_every_path_and_with_any_threads(
    shape: tuple[int, ...], cpu_path: str
) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    mask = seeded_mask(x, 0.9)
    assert (mask.dtype, mask.shape, mask.is_contiguous()) == (torch.bool, x.shape, True)
    _C.set_cpu_path("portable")
    assert_same(seeded_mask(x, 0.9), mask)
    _C.set_cpu_path(cpu_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same(seeded_mask(x, 0.9), mask)
    finally:
        torch.set_num_threads(threads)


def test_masks_follow_torchs_generator() -> None:
    x = torch.empty(64, 100)
    first, second = seeded_mask(x, 0.5), dropout_mask(x, 0.5)
    assert (first != second).any()
    torch.manual_seed(8)
    assert (dropout_mask(x, 0.5) != first).any()
    torch.manual_seed(7)
    with torch.random.fork_rng():
        dropout_mask(x, 0.5)
    assert_same(dropout_mask(x, 0.5), first)
    # Whatever x is like: strided, in another dtype, to be differentiated.
    torch.manual_seed(7)
    assert_same(dropout_mask(torch.empty(100, 64).t().half().requires_grad_(), 0.5), first)
    assert not first.requires_grad
    assert dropout_mask(x, 1.0).all()
    assert not dropout_mask(x, 0.0).any()


@pytest.mark.parametrize("keep", [-0.1, 1.5, math.nan])
def test_a_mask_wants_a_probability(keep: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout_mask: keep: expected a probability in \[0, 1\], got {keep}"):
        dropout_mask(torch.empty(3), keep)


def test_masks_in_torchs_tracers() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(dropout_mask.default, (torch.empty(3, 64), 0.5), test_utils=checks)
    assert torch.Tag.nondeterministic_seeded in dropout_mask.default.tags  # not to be computed twice
