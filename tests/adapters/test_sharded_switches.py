"""Adapters are switched, and not merged, where FSDP2 (fully_shard) keeps them, whatever it has gathered meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from reference import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qlora_ext import LoraConfig, PagedAdamW, add_adapter, delete_adapter, merge_adapter, quantize_model, set_adapter

pytestmark = pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 shards floating-point parameters only")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_with(*names: str) -> nn.Module:
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    for name in names:
        add_adapter(model, LoraConfig(r=4), name)
    return model


@pytest.mark.parametrize("reshards", [True, False])
@pytest.mark.parametrize("how", ["set", "delete"])
def test_another_adapter_trains_after_an_evaluation(how: str, reshards: bool) -> None:
    """After a forward alone the outermost group has whole parameters still, or all have."""
    model, mesh = model_with("one", "two"), init_device_mesh("cpu", (1,))
    set_adapter(model, "one")
    for module in (model[1], model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshards)
    with torch.no_grad():
        model(X)
    if how == "set":
        set_adapter(model, "two")
    else:
        with pytest.warns(UserWarning, match="'one' was active"):
            delete_adapter(model, "one")
    expected = {f"{i}.lora_{part}.two" for i in range(2) for part in "AB"}
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
        optimizer.step()


@pytest.mark.parametrize("dequantize", [False, True])
def test_sharded_adapters_of_a_whole_base_are_not_merged(dequantize: bool) -> None:
    """As where what is frozen is left out of FSDP2."""
    model = model_with("default")
    frozen = {p for p in model.parameters() if not p.requires_grad}
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=frozen)
    before = model(X).detach()
    with pytest.raises(ValueError, match=r"merge_adapter: model: 0: expected .*without fully_shard.*got a DTensor"):
        merge_adapter(model, dequantize=dequantize)
    assert_same(model(X).detach(), before)
    with pytest.raises(ValueError, match=r"add_adapter: model: 0: expected .*before fully_shard.*got a DTensor"):
        add_adapter(model, LoraConfig(), "new")
