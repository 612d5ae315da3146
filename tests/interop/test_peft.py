"""PEFT's LoRA around Linear4bit, against the same adapters on the dense model of the same weights."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_models import (
    adapted,
    adapted_pair,
    assert_same,
    assert_same_bits,
    dense_twin,
    error,
    logits,
    lora,
    results,
    small_4bit,
    stored,
    token_ids,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from qlora_ext import Linear4bit
from qlora_ext.functional import dequantize_4bit, quantize_4bit
from qlora_ext.interop.peft import LoraLinear4bit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
PATTERNS = {"rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"(q|v)_proj": 9}}
SOME = {"exclude_modules": ["o_proj"], "layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "up_proj"]}
ALORA = {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
QKV = ["q_proj", "k_proj", "v_proj"]
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "all-linear": ("llama", [{}]),
    "patterns": ("llama", [{"use_rslora": True, **PATTERNS}]),
    "some": ("llama", [SOME]),
    "two": ("llama", [{}, {"r": 6, "target_modules": ["q_proj", "down_proj"]}]),
    "lora-bias": ("qwen2", [{"lora_bias": True, "target_modules": QKV}]),
    "all-biases": ("qwen2", [{"bias": "all"}]),
    "conv1d": ("gpt2", [CONV1D]),
    "classifier": ("bert", [{"task_type": "SEQ_CLS"}]),
    "modules-to-save": ("llama", [{"modules_to_save": ["lm_head"]}]),
    "dora": ("llama", [{"use_dora": True}]),
    "dora-conv1d": ("gpt2", [CONV1D | {"use_dora": True}]),
    "lora-and-dora": ("llama", [{}, {"use_dora": True}]),
    "gaussian": ("llama", [{"init_lora_weights": "gaussian"}]),
}
by_case = pytest.mark.parametrize(("name", "fields"), CASES.values(), ids=CASES)


def activate_all(*models: Any) -> None:
    for model in models:
        model.base_model.set_adapter(list(model.peft_config))


def layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear4bit)}


def dense_weight(model: Any, name: str) -> Tensor:
    """Of this layer, or of what it adapts, [out, in]."""
    layer = model.get_submodule(name)
    base = layer.get_base_layer() if isinstance(layer, peft.tuners.lora.LoraLayer) else layer
    return base.weight.detach() if isinstance(base, torch.nn.Linear) else base.weight.detach().T


def rounded(weight: Tensor, layer: Linear4bit) -> Tensor:
    return dequantize_4bit(*quantize_4bit(weight.contiguous(), **layer.options))


def ops_of(model: Any, ids: Tensor, **inputs: Any) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as run:
        logits(model, ids, **inputs)
    counts = {event.key: event.count for event in run.key_averages()}
    return {op: counts.get(f"qlora_ext::{op}", 0) for op in ("lora_linear_4bit", "linear_4bit")}


@by_case
def test_results_are_the_dense_models(name: str, fields: list[dict[str, Any]]) -> None:
    model, twin = adapted_pair(name, *(lora(**each) for each in fields))
    activate_all(model, twin)
    assert layers(model)
    assert model.base_model.targeted_module_names == twin.base_model.targeted_module_names
    ids = token_ids()
    got, expected = results(model, ids), results(twin, ids)
    assert error(expected["logits"], logits(small_4bit(name), ids)) > 0.01
    assert_same(got, expected)
    with model.disable_adapter():
        assert_same_bits(stored(model), stored(adapted(small_4bit(name), *(lora(**each) for each in fields))))
        assert torch.equal(logits(model, ids), logits(small_4bit(name), ids))


def test_invoked_adapters_are_the_dense_models() -> None:
    model, twin = adapted_pair("llama", lora(**ALORA))
    ids = token_ids()
    ids[:, 3] = 3
    expected = logits(twin, ids)
    assert error(logits(model, ids), expected) < 2e-5
    assert error(expected, logits(small_4bit("llama"), ids)) > 0.01


def test_all_linear_leaves_the_head_and_the_storage_of_experts() -> None:
    for name, count in (("llama", 14), ("mixtral", 8)):
        model, _ = adapted_pair(name, lora())
        assert len(layers(model)) == count
        assert model.base_model.targeted_module_names == [k.removeprefix("base_model.model.") for k in layers(model)]
        assert not any("lm_head" in key or "stack" in key for key, _ in model.named_parameters() if "lora_" in key)


@pytest.mark.parametrize("mode", ["bf16", "autocast", "autocast-of-bf16"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_bf16_loses_no_more_than_the_dense_model(mode: str, fields: dict[str, Any]) -> None:
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    model, twin = adapted_pair("llama", lora(**fields), dtype=dtype)
    exact = copy.deepcopy(twin).double()
    ids = token_ids()
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in mode):
        got, dense = results(model, ids), results(twin, ids)
    for name, tensor in results(exact, ids).items():
        assert got[name].dtype == dense[name].dtype
        assert 0 < error(got[name], tensor) <= 2 * error(dense[name], tensor) + 1e-3, name


def test_plain_lora_is_one_op_a_layer_and_all_else_is_none() -> None:
    ids, count = token_ids(), 14
    model = adapted(small_4bit("llama"), lora(lora_dropout=0.5), lora(r=2))
    fused, alone = {"lora_linear_4bit": count, "linear_4bit": 0}, {"lora_linear_4bit": 0, "linear_4bit": count}
    assert ops_of(model, ids) == fused
    assert ops_of(model.train(), ids) == fused
    activate_all(model)
    assert ops_of(model.eval(), ids) == fused
    assert ops_of(model, ids, adapter_names=["default", "other", "__base__"]) == alone
    with model.disable_adapter():
        assert ops_of(model, ids) == alone
    model.merge_adapter()
    assert ops_of(model, ids) == alone
    assert ops_of(adapted(small_4bit("llama"), lora(use_dora=True)), ids) == alone


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", ""])
def test_hooks_inside_run(part: str) -> None:
    models = adapted_pair("llama", lora(target_modules=["q_proj"]))
    ids, ran = token_ids(), []
    plain = logits(models[0], ids)
    for model in models:
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.get_submodule(part).register_forward_hook(lambda _, __, y: ran.append(y) or 3 * y)
    assert error(logits(models[0], ids), logits(models[1], ids)) < 2e-5
    assert error(logits(models[0], ids), plain) > 1e-3
    assert len(ran) == 3


def test_dropout_is_unbiased_and_of_the_stated_rate() -> None:
    model = adapted(small_4bit("llama"), lora(lora_dropout=0.3))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(128).expand(20000, -1)
    with torch.no_grad():
        full, y = layer(x[:1]), layer.train()(x)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    variance = ((layer.scaling["default"] * B @ A * x[0]) ** 2).sum(1) * 0.3 / 0.7
    assert ((y.mean(0) - full[0]) / (variance / len(x)).sqrt()).abs().max() < 5
    torch.testing.assert_close(y.var(0), variance, rtol=0.06, atol=0)


def test_dropout_follows_the_seed_and_the_mode() -> None:
    model = adapted(small_4bit("llama"), lora(lora_dropout=0.3))
    without = adapted(small_4bit("llama"), lora())
    ids, train, again, other = token_ids(), *(copy.deepcopy(model).train() for _ in range(3))
    outputs = []
    for each, seed in ((train, 5), (again, 5), (other, 6)):
        torch.manual_seed(seed)
        outputs.append(logits(each, ids))
    assert torch.equal(outputs[0], outputs[1])
    assert error(outputs[2], outputs[0]) > 1e-3
    assert torch.equal(logits(model, ids), logits(without, ids))
    assert error(outputs[0], logits(model, ids)) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(reentrant: bool) -> None:
    ids = token_ids()
    model = adapted(small_4bit("llama"), lora(lora_dropout=0.3)).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for each in (model, checkpointed):
        torch.manual_seed(5)
        gradients.append(results(each, ids, use_cache=False))
    assert_same_bits(gradients[1], gradients[0])


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"], **PATTERNS}])
def test_files_are_the_dense_models_both_ways(tmp_path: Path, fields: dict[str, Any]) -> None:
    model, twin = adapted_pair("llama", lora(**fields))
    ids, folders = token_ids(), (tmp_path / "4bit", tmp_path / "dense")
    for each, folder in zip((model, twin), folders, strict=True):
        each.save_pretrained(folder)
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert_same_bits(*files)
    from_dense = peft.PeftModel.from_pretrained(small_4bit("llama"), folders[1]).eval()
    onto_dense = peft.PeftModel.from_pretrained(dense_twin(small_4bit("llama")), folders[0]).eval()
    assert torch.equal(logits(from_dense, ids), logits(model, ids))
    assert torch.equal(logits(onto_dense, ids), logits(twin, ids))
    sparing = peft.PeftModel.from_pretrained(small_4bit("llama"), folders[0], low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(logits(sparing.eval(), ids), logits(model, ids))
    assert_same_bits(results(sparing, ids), results(model, ids))


def test_adapters_can_be_loaded_switched_and_deleted(tmp_path: Path) -> None:
    fields = {}, {"r": 6, "target_modules": ["q_proj", "down_proj"]}
    model, twin = adapted_pair("llama", *(lora(**each) for each in fields))
    twin.save_pretrained(tmp_path)
    ids, fresh = token_ids(), adapted(small_4bit("llama"), lora(r=2))
    expected = {}
    for active in (["default"], ["other"], ["default", "other"]):
        twin.base_model.set_adapter(active)
        model.base_model.set_adapter(active)
        expected[tuple(active)] = logits(twin, ids)
        assert model.active_adapters == active
        assert error(logits(model, ids), expected[tuple(active)]) < 2e-5
    fresh.load_adapter(tmp_path, "first")
    fresh.load_adapter(tmp_path / "other", "second")
    fresh.delete_adapter("default")
    assert fresh.peft_config.keys() == {"first", "second"}
    for active, known in ((["first"], ("default",)), (["second"], ("other",)), (["first", "second"], (*expected,)[2])):
        fresh.base_model.set_adapter(active)
        assert error(logits(fresh, ids), expected[known]) < 2e-5
    with pytest.raises(ValueError, match="default not found"):
        fresh.set_adapter("default")


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_linear"])
def test_weighted_sums_of_adapters_are_the_dense_models(kind: str) -> None:
    models = adapted_pair("llama", lora(), lora())
    ids, outputs = token_ids(), []
    for model in models:
        torch.manual_seed(3)
        density = {"density": 0.5} if kind in ("ties", "dare_linear") else {}
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", combination_type=kind, **density)
        before = logits(model, ids)
        model.set_adapter("sum")
        outputs.append(logits(model, ids))
        assert error(outputs[-1], before) > 0.01
    assert error(*outputs) < 5e-5


def test_rows_can_have_adapters_of_their_own() -> None:
    model, twin = adapted_pair("llama", lora(), lora(r=6, lora_bias=True))
    ids, names = token_ids(4), ["other", "__base__", "default", "other"]
    got = logits(model, ids, adapter_names=names)
    assert error(got, logits(twin, ids, adapter_names=names)) < 2e-5
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            model.set_adapter("default" if name == "__base__" else name)
            assert error(got[row : row + 1], logits(model, ids[row : row + 1])) < 2e-5


def test_scales_can_be_changed() -> None:
    model, twin = adapted_pair("llama", lora())
    ids = token_ids()
    before = logits(model, ids)
    for each in (model, twin):
        for layer in each.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("default", 0.5)
    assert error(logits(model, ids), logits(twin, ids)) < 2e-5
    assert error(logits(model, ids), before) > 0.01


@pytest.mark.parametrize("safe", [False, True])
@by_case
def test_merging_rounds_the_dense_models_sum_and_can_be_undone(name: str, fields: list[Any], safe: bool) -> None:
    model, twin = adapted_pair(name, *(lora(**each) for each in fields))
    activate_all(model, twin)
    ids, before, bases = token_ids(), stored(model), {k: m.get_base_layer() for k, m in layers(model).items()}
    unmerged = logits(model, ids)
    parameters = {key: id(p) for key, p in model.named_parameters()}
    for each in (model, twin):
        each.merge_adapter(safe_merge=safe)
    for key, base in bases.items():
        expected = dense_weight(twin, key)
        assert error(base.dequantize(), rounded(expected, base)) < 0.01, key
        if base.bias is not None:
            torch.testing.assert_close(base.bias, twin.get_submodule(key).get_base_layer().bias)
    assert error(logits(model, ids), unmerged) > 1e-4
    model.unmerge_adapter()
    assert_same_bits(stored(model), before)
    assert {key: id(p) for key, p in model.named_parameters()} == parameters
    assert torch.equal(logits(model, ids), unmerged)


@pytest.mark.parametrize("second", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_one_after_the_other_rounds_once_more_at_most(second: dict[str, Any]) -> None:
    model, twin = adapted_pair("llama", lora(), lora(**second))
    activate_all(model, twin)
    before = stored(model)
    for each in (model, twin):
        for adapter in ("default", "other", "other"):
            each.merge_adapter([adapter])
    for key, layer in layers(model).items():
        expected, base = dense_weight(twin, key), layer.get_base_layer()
        assert layer.merged_adapters == ["default", "other"]
        assert error(base.dequantize(), expected) < 1.4 * error(rounded(expected, base), expected)
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model, ids := token_ids()), logits(small_4bit("llama"), ids))
    assert_same_bits(stored(model), before)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "bias"])
def test_merging_refuses_nan_and_leaves_the_layer(part: str) -> None:
    model = adapted(small_4bit("qwen2"), lora(lora_bias=True, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = stored(layer)
    with torch.no_grad():
        (layer.lora_B["default"].bias if part == "bias" else getattr(layer, part)["default"].weight).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    assert_same_bits(stored(layer), before)


MERGED = {
    "dora": ("llama", {"use_dora": True}),
    "conv1d": ("gpt2", CONV1D),
    "bias": ("qwen2", {"lora_bias": True, "target_modules": QKV}),
}


@pytest.mark.parametrize(("name", "fields"), MERGED.values(), ids=MERGED)
def test_merged_models_are_4bit_models(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, twin = adapted_pair(name, lora(**fields))
    ids, adapted_layers = token_ids(), [key.removeprefix("base_model.model.") for key in layers(model)]
    assert torch.equal(logits(copy.deepcopy(model).unload(), ids), logits(small_4bit(name), ids))
    merged, dense = model.merge_and_unload(), twin.merge_and_unload()
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())
    for key in adapted_layers:
        layer, expected = merged.get_submodule(key), dense_weight(dense, key)
        assert type(layer) is Linear4bit
        assert error(layer.dequantize(), rounded(expected, layer)) < 0.01
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), logits(merged, ids))
