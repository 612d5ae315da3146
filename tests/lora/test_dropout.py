"""Dropout before the adapters of a LoraLinear: who decides about it. Its gradients: test_lora_linear.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from random_layers import BASES, make_base, make_lora
from reference import assert_same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from qlora_ext import LoraConfig, add_adapter, load_adapter, save_adapter

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


def test_no_mask_is_kept_for_the_backward_pass() -> None:
    """Of a layer in 4 bits: the seeds of its adapters' masks, and nothing else."""

    def kept_bytes(p: float) -> int:
        sizes: list[int] = []
        layer = make_lora(make_base("Linear4bit"), *[LoraConfig(lora_dropout=p)] * 2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            layer(torch.randn(100, 256))
        return sum(sizes)

    assert kept_bytes(0.1) == kept_bytes(0.0) + 2 * 8


@by_base
def test_masks_follow_torchs_generator(base: str) -> None:
    layer, x = make_lora(make_base(base), LoraConfig(lora_dropout=0.5)), torch.randn(3, 256)
    torch.manual_seed(7)
    first, second = layer(x), layer(x)
    assert (first != second).any()
    torch.manual_seed(7)
    with torch.random.fork_rng():
        assert_same(layer(x), first)
    assert_same(layer(x), first)


@by_base
def test_the_default_device_is_not_where_masks_are_drawn(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(lora_dropout=0.5))
    x = torch.randn(3, 256)
    with torch.device("meta"):
        assert layer(x).device.type == "cpu"


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls an op without a rule once for each
def test_vmap_is_told_whether_masks_differ() -> None:
    layer, x = make_lora(make_base("nn.Linear"), LoraConfig(lora_dropout=0.5)), torch.randn(1, 3, 256)
    same = torch.func.vmap(layer, randomness="same")(x.expand(2, 3, 256))
    torch.testing.assert_close(same[0], same[1], rtol=1e-3, atol=1e-5)
    members = [p.expand(2, *p.shape) for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def member(*parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x[0],))  # type: ignore[no-any-return]

    for each, batch in ((layer, [x.expand(2, 3, 256)]), (member, members)):
        differ = torch.func.vmap(each, randomness="different")(*batch)
        assert (differ[0] != differ[1]).any()
        with pytest.raises(RuntimeError, match="random"):
            torch.func.vmap(each)(*batch)


def test_a_sharded_input_is_dropped_by_torch() -> None:
    layer = make_lora(make_base("nn.Linear"), LoraConfig(lora_dropout=0.5))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer, x = distribute_module(layer, mesh), distribute_tensor(torch.randn(4, 256), mesh, [Shard(0)])
        assert not torch.equal(layer(x).full_tensor(), layer(x).full_tensor())
    finally:
        dist.destroy_process_group()
