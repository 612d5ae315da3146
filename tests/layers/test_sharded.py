"""FSDP2 (fully_shard) of layers, and of adapters: added before it, saved and loaded after it; all else is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapted_model import TOKENS, base_model, logits, with_adapter
from mixtures import TOKENS as MIXTURE_TOKENS
from mixtures import adapted
from random_layers import make_linear, names_of, randomize_adapters, state_bytes, with_gradients
from reference import assert_same
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from qlora_ext import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    delete_adapter,
    load_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    unmerge_adapter,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
pytestmark = pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 shards floating-point parameters only")


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module, *, by_layer: bool = True) -> nn.Module:
    """And run it, after which layers of the outermost group still have whole parameters."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers if by_layer else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    logits(model)
    return model


def with_head(seed: int) -> LlamaForSequenceClassification:
    """An adapter and a head that is trained whole; the base is the same each time."""
    torch.manual_seed(0)
    model = quantize_model(LlamaForSequenceClassification(tiny_config(pad_token_id=0)).eval(), skip=["score"])
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(seed)
    randomize_adapters(model)
    nn.init.normal_(model.score.requires_grad_(True).weight)
    return model


def test_names_in_a_file_know_of_no_compiled_layer_that_is_sharded(tmp_path: Path) -> None:
    """fully_shard makes a subclass of torch.compile's module."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    add_adapter(model, LoraConfig(r=2))
    model[0] = torch.compile(model[0], backend="eager")
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    save_adapter(model, tmp_path)
    names = {f"base_model.model.{i}.lora_{part}.weight" for i in (0, 1) for part in "AB"}
    assert load_file(tmp_path / WEIGHTS).keys() == names


def test_a_sharded_model_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    model = with_head(1)
    save_adapter(model, tmp_path / "plain")
    save_adapter(shard(model), tmp_path / "sharded")
    assert isinstance(model.score.weight, DTensor)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "sharded" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_what_fsdp2_computes_with_in_bfloat16_is_saved_in_float32(tmp_path: Path) -> None:
    """After a forward, parameters of the outermost group are still those in bfloat16."""
    model = with_head(1)
    expected = model.score.weight.detach().clone()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model.score, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy, reshard_after_forward=False)
    logits(model)
    assert model.score.weight.dtype == torch.bfloat16
    save_adapter(model, tmp_path)
    assert_same(load_file(tmp_path / WEIGHTS)["base_model.model.score.weight"], expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_mixed_precision_needs_double_quantization(double_quant: bool) -> None:
    """FSDP2 casts what is in float32, absmax without double quantization among it."""
    layer, x = make_linear(256, double_quant=double_quant), torch.randn(3, 256).bfloat16()
    expected = layer(x)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    if double_quant:
        assert_same(layer(x), expected)
    else:
        with pytest.raises(TypeError, match=r"absmax: expected .*float32.*, got .*[bB]Float16"):
            layer(x)


def test_a_sharded_model_loads_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    saved, model = with_head(1), shard(with_head(2))
    save_adapter(saved, tmp_path)
    assert (logits(model) - logits(saved)).abs().max() > 1e-3
    load_adapter(model, tmp_path)
    assert_same(logits(model), logits(saved))
    model(TOKENS).logits.sum().backward()
    for parameter in (model.score.weight, model.model.layers[0].mlp.down_proj.lora_A["default"]):
        assert isinstance(parameter, DTensor)
        assert isinstance(parameter.grad, DTensor)
    assert_same(logits(model), logits(saved))  # with what was in the parts, gathered again


def test_a_sharded_head_is_compared_with_the_files_whole(tmp_path: Path) -> None:
    model = with_head(1)
    save_adapter(model, tmp_path / "same")
    save_adapter(with_head(2), tmp_path / "changed")
    with pytest.warns(UserWarning, match=r"score\.weight: trained beside another adapter, now frozen"):
        add_adapter(model, LoraConfig(target_modules=["q_proj"]), "other")
    load_adapter(shard(model), tmp_path / "same")
    with pytest.raises(ValueError, match=r"score\.weight: expected the file's values already there.*\['other'\]"):
        load_adapter(model, tmp_path / "changed")


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("name", ["default", "new"])
def test_no_adapter_is_added_to_a_sharded_layer(name: str, by_layer: bool, tmp_path: Path) -> None:
    """Its gradients would never be averaged over the processes."""
    save_adapter(with_adapter(), tmp_path)
    model = shard(base_model() if name == "default" else with_adapter(), by_layer=by_layer)
    lora = names_of(model, LoraLinear)
    expected = r"model: model\.layers\.0\..*add adapters before fully_shard.*DTensor"
    with pytest.raises(ValueError, match=f"add_adapter: {expected}"):
        add_adapter(model, LoraConfig(), name)
    with pytest.raises(ValueError, match=f"load_adapter: {expected}"):
        load_adapter(model, tmp_path, name)
    assert names_of(model, LoraLinear) == lora
    assert not any("new" in layer.configs for layer in model.modules() if isinstance(layer, LoraLinear))


def test_an_adapter_is_added_to_a_layer_that_is_not_sharded() -> None:
    model = nn.ModuleDict({"sharded": nn.Linear(8, 8), "plain": nn.Linear(8, 8)})
    fully_shard(model["sharded"], mesh=init_device_mesh("cpu", (1,)))
    add_adapter(model, LoraConfig(target_modules=["plain"]))
    merge_adapter(model)
    assert model["plain"].merged


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_sharded_model_is_not_merged(dequantize: bool, by_layer: bool) -> None:
    model = shard(with_adapter(), by_layer=by_layer)
    before = logits(model)
    with pytest.raises(ValueError, match=r"merge_adapter: model: model\.layers\.0.*without fully_shard.*DTensor"):
        merge_adapter(model, dequantize=dequantize)
    assert_same(logits(model), before)


def test_what_was_merged_before_is_unmerged() -> None:
    model = with_adapter()
    expected = logits(model)
    merge_adapter(model)
    shard(model)
    unmerge_adapter(model)
    assert_same(logits(model), expected)


def test_an_adapter_is_deleted() -> None:
    model = shard(with_adapter())
    delete_adapter(model, "default")
    assert_same(logits(model), logits(base_model()))


OF_TWO = """
import os, sys
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from qlora_ext import LoraConfig, add_adapter, load_adapter, save_adapter
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
add_adapter(model, LoraConfig(r=3, target_modules=["0"]))
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
load_adapter(model, folder + "/saved")
assert model[1].weight.to_local().numel() < 15
save_adapter(model, f"{folder}/{rank}")
dist.barrier()
os._exit(0)  # gloo's threads, which may abort a process that ends, are not what is tested
"""


def test_each_of_two_processes_loads_its_parts_and_saves_the_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    add_adapter(model, LoraConfig(r=3, target_modules=["0"]))
    randomize_adapters(model)
    model[1].requires_grad_(True)
    save_adapter(model, tmp_path / "saved")
    processes = [subprocess.Popen([sys.executable, "-c", OF_TWO, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for rank, file in itertools.product("01", (CONFIG, WEIGHTS)):
        assert (tmp_path / rank / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_adapters_on_experts_train_as_unsharded(accumulate: int) -> None:
    """After a forward whose graph is left, too."""
    trained = []
    for sharded in (False, True):
        model = adapted("mixtral")
        if sharded:
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(MIXTURE_TOKENS)
            for tokens in MIXTURE_TOKENS[:accumulate]:
                model(tokens[None]).logits.square().mean().backward()
            optimizer.step()
        trained.append([p.full_tensor() if sharded else p for p in model.parameters() if p.requires_grad])
    assert_same(trained[1], trained[0])


@pytest.mark.parametrize("part", ["", "stack", "stack.base_layer"])
def test_experts_are_sharded_by_themselves(part: str) -> None:
    model = adapted("mixtral")
    expected = model(MIXTURE_TOKENS).logits
    gradients = torch.autograd.grad(expected.square().mean(), [p for p in model.parameters() if p.requires_grad])
    experts = model.model.layers[0].mlp.experts.down_proj
    fully_shard(experts.get_submodule(part), mesh=init_device_mesh("cpu", (1,)))
    y = model(MIXTURE_TOKENS).logits
    assert_same(y, expected)
    y.square().mean().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert_same([getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in trained], [*gradients])


def test_fully_shard_keeps_the_bytes_and_the_results() -> None:
    """FSDP2 turns the parameters to DTensors, frozen uint8 ones too, and back for each forward."""
    model = nn.Sequential(make_linear(), make_linear(48, double_quant=False))
    x, mesh = torch.randn(3, 256), init_device_mesh("cpu", (1,))
    expected, before = with_gradients(model, [x]), state_bytes(model)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for got, same in zip(with_gradients(model, [x]), expected, strict=True):
        assert_same(got, same)
    model(x).sum().backward()
    assert model[0].bias.grad is not None
    whole = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in model.state_dict().items()}
    copy = nn.Sequential(make_linear(), make_linear(48, double_quant=False))
    copy.load_state_dict(whole, strict=True)
    assert state_bytes(copy) == before


@pytest.mark.parametrize("alone", [False, True])
def test_nothing_is_quantized_that_is_sharded(alone: bool) -> None:
    """FSDP2 would put its own shard in the place of the new weight."""
    model = nn.Sequential(nn.Linear(64, 64), make_linear(64))
    x, float_weight = torch.randn(3, 64), {"1.weight": torch.randn(model[1].out_features, 64)}
    expected = model(x)
    for module in model if alone else [model]:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^quantize_model: model: 0: expected a layer whose weight is whole"):
            quantize_model(model)
        with pytest.raises(ValueError, match=r"^Linear4bit: 1\.weight: expected a float weight before fully_shard"):
            model.load_state_dict(float_weight, strict=False)
        assert_same(model(x), expected)  # after which the outermost group has whole weights


def test_an_adapter_with_its_bases_weight_loads_into_a_sharded_model(tmp_path: Path) -> None:
    """PEFT saves the weight of an output head beside its adapter: it is compared, and not written."""
    model = quantize_model(LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval(), skip=())
    add_adapter(model, LoraConfig(r=2, target_modules=["lm_head"]))
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    weight = {"base_model.model.lm_head.base_layer.weight": model.lm_head.base_layer.dequantize(torch.float32)}
    save_file(load_file(tmp_path / WEIGHTS) | weight, tmp_path / WEIGHTS)
    expected = logits(model)
    load_adapter(shard(model), tmp_path)
    assert_same(logits(model), expected)
