"""PEFT's LoRA on fused experts in 4 bits; and on 4-bit layers its initialisations, counts, copies and refusals."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_config
from peft.tuners.lora.config import (
    BdLoraConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from safetensors.torch import load_file
from small_models import (
    adapted,
    adapted_pair,
    assert_same,
    assert_same_bits,
    dense_twin,
    error,
    load_4bit,
    logits,
    lora,
    randomize,
    results,
    save_small_model,
    small_4bit,
    stored,
    token_ids,
)
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from qlora_ext.functional import dequantize_4bit, quantize_4bit
from qlora_ext.interop.peft import LoraLinear4bit, ParamWrapper, replace_lora_weights_loftq

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*")
DOWN, GATE = "mlp.experts.down_proj", "mlp.experts.gate_up_proj"
EXPERTS = {"target_modules": [], "target_parameters": [DOWN, GATE]}
EXPERT_CASES: dict[str, list[dict[str, Any]]] = {
    "one": [{"target_modules": [], "target_parameters": [GATE]}],
    "two": [EXPERTS],
    "rslora": [EXPERTS | {"use_rslora": True}],
    "two-adapters": [EXPERTS, EXPERTS | {"r": 2}],
    "with-layers": [{"target_modules": ["q_proj", "v_proj"], "target_parameters": [DOWN, GATE]}],
}
by_experts = pytest.mark.parametrize("fields", EXPERT_CASES.values(), ids=EXPERT_CASES)


def pair_of_mixtures(fields: list[dict[str, Any]]) -> tuple[Any, Any]:
    models = adapted_pair("mixtral", *(lora(**each) for each in fields))
    for model in models:
        model.base_model.set_adapter(list(model.peft_config))
    return models


def wrappers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def requantized(weight: Tensor, options: dict[str, Any]) -> Tensor:
    return dequantize_4bit(*quantize_4bit(weight.contiguous(), **options))


@by_experts
def test_experts_compute_what_the_dense_model_does(fields: list[dict[str, Any]]) -> None:
    model, twin = pair_of_mixtures(fields)
    ids = token_ids()
    assert len(wrappers(model)) == 2 * len(fields[0]["target_parameters"])
    expected = results(twin, ids)
    assert error(expected["logits"], logits(small_4bit("mixtral"), ids)) > 0.01
    assert_same(results(model, ids), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(small_4bit("mixtral"), ids))
    for active in model.peft_config:
        for each in (model, twin):
            each.set_adapter(active)
        assert error(logits(model, ids), logits(twin, ids)) < 2e-5


@by_experts
def test_experts_files_are_the_dense_models_both_ways(fields: list[dict[str, Any]], tmp_path: Path) -> None:
    model, twin = pair_of_mixtures(fields[:1])
    ids, folders = token_ids(), (tmp_path / "4bit", tmp_path / "dense")
    for each, folder in zip((model, twin), folders, strict=True):
        each.save_pretrained(folder)
    assert_same_bits(*(load_file(folder / "adapter_model.safetensors") for folder in folders))
    from_dense = peft.PeftModel.from_pretrained(small_4bit("mixtral"), folders[1]).eval()
    onto_dense = peft.PeftModel.from_pretrained(dense_twin(small_4bit("mixtral")), folders[0]).eval()
    assert torch.equal(logits(from_dense, ids), logits(model, ids))
    assert torch.equal(logits(onto_dense, ids), logits(twin, ids))


@by_experts
def test_merged_experts_round_the_dense_models_sum(fields: list[dict[str, Any]], tmp_path: Path) -> None:
    model, twin = pair_of_mixtures(fields)
    ids, before = token_ids(), stored(model)
    unmerged = logits(model, ids)
    for each in (model, twin):
        each.merge_adapter(safe_merge=True)
    dense = [m for m in twin.modules() if type(m).__name__ == "ParamWrapper"]
    for wrapper, other in zip(wrappers(model), dense, strict=True):
        experts, expected = wrapper.get_param(), other.get_param().detach()
        rounded = requantized(expected.flatten(0, 1), experts.base.options).view(expected.shape)
        assert error(experts.dequantize(), rounded) < 0.01
    assert error(logits(model, ids), unmerged) > 0.01
    model.unmerge_adapter()
    assert_same_bits(stored(model), before)
    assert torch.equal(logits(model, ids), unmerged)
    model.merge_adapter()
    expected = logits(model, ids)
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model, ids), logits(small_4bit("mixtral"), ids))
    merged = model.merge_and_unload()
    assert not wrappers(merged)
    assert torch.equal(logits(merged, ids), expected)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval(), ids), expected)


def test_unloaded_experts_forget_their_adapters() -> None:
    ids, model = token_ids(), adapted(small_4bit("mixtral"), lora(**EXPERTS))
    assert torch.equal(logits(model.unload(), ids), logits(small_4bit("mixtral"), ids))


def test_merging_experts_refuses_nan() -> None:
    model = adapted(small_4bit("mixtral"), lora(**EXPERTS))
    before, wrapper = stored(model), wrappers(model)[0]
    nn.init.constant_(wrapper.lora_A["default"].weight, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        wrapper.merge(safe_merge=True)
    assert not wrapper.merged
    assert_same_bits(stored(model), before)


REFUSED = {
    "corda": ("llama", {"init_lora_weights": "corda"}),
    "lora_ga": ("llama", {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "loftq": ("llama", {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}),
    "8-bit-loftq": ("llama", {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=8)}),
    "velora": ("llama", {"velora_config": VeloraConfig()}),
    **({"kasa": ("llama", {"kasa_config": lora_config.KasaConfig()})} if hasattr(lora_config, "KasaConfig") else {}),
    "monteclora": ("llama", {"monteclora_config": MontecloraConfig()}),
    "bdlora": ("llama", {"use_bdlora": BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"])}),
    "dropout-of-experts": ("mixtral", {**EXPERTS, "lora_dropout": 0.1}),
    "dora-of-experts": ("mixtral", {**EXPERTS, "use_dora": True}),
    "bias-of-experts": ("mixtral", {**EXPERTS, "lora_bias": True}),
    "pissa-of-experts": ("mixtral", {**EXPERTS, "init_lora_weights": "pissa"}),
    "loftq-of-experts": ("mixtral", {**EXPERTS, "init_lora_weights": "loftq", "loftq_config": LoftQConfig()}),
}


@pytest.mark.parametrize(("name", "fields"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected .*got|ParamWrapper does not work with"):
        adapted(small_4bit(name), lora(**fields))


INITS = [(name, init) for name in ("llama", "gpt2") for init in ("pissa", "pissa_niter_4", "orthogonal")]


@pytest.mark.parametrize(("name", "init"), [*INITS, ("llama", "olora")])  # PEFT's olora knows no dense Conv1D
def test_initialisations_leave_the_dense_models_rest_in_4_bits(name: str, init: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if name == "gpt2" else {}
    model = small_4bit(name)
    pair, config = [], lora(init_lora_weights=init, **targets)
    for each in (model, dense_twin(model)):
        torch.manual_seed(2)
        pair.append(peft.get_peft_model(each, copy.deepcopy(config)).eval())
    got, expected = ({k: p for k, p in each.named_parameters() if "lora_" in k} for each in pair)
    assert_same(got, expected, 2e-4)
    plain = adapted(small_4bit(name), lora(**targets))
    for key, layer in ((k, m) for k, m in pair[0].named_modules() if isinstance(m, LoraLinear4bit)):
        rest, base = pair[1].get_submodule(key).get_base_layer().weight.detach(), layer.get_base_layer()
        original = plain.get_submodule(key).get_base_layer().dequantize()
        rest = rest.T if name == "gpt2" else rest
        assert error(base.dequantize(), rest if init == "orthogonal" else requantized(rest, base.options)) < 0.01
        whole = base.dequantize() + layer.get_delta_weight("default")
        assert error(whole, original) < 0.11  # that of rounding to NF4
    if init != "pissa_niter_4":  # whose SVD is random
        randomize(pair[0])
        pair[0].save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(small_4bit(name), tmp_path).eval()
        ids = token_ids()
        assert torch.equal(logits(loaded, ids), logits(pair[0], ids))


def test_loftq_starts_from_what_4_bits_lose(tmp_path: Path) -> None:
    """Each layer with its adapter is as near to the float weight as an adapter of this rank can bring it."""
    folder = save_small_model("llama", tmp_path)
    model, floats = peft.get_peft_model(load_4bit("llama", folder), lora(r=8)), load_file(folder / "model.safetensors")
    replace_lora_weights_loftq(model, folder)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLinear4bit)]
    assert len(layers) == 14
    for name, layer in layers:
        lost = floats[f"{name.removeprefix('base_model.model.')}.weight"] - layer.get_base_layer().dequantize()
        left = lost - layer.get_delta_weight("default")
        best = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
        torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=0)
    assert all(gradient.abs().max() > 0 for gradient in results(model, token_ids()).values())
    with pytest.raises(ValueError, match=r"other.*got none"):
        replace_lora_weights_loftq(model, folder, "other")


def test_eva_finds_the_dense_models_directions() -> None:
    data = [{"input_ids": token_ids(4, 12)} for _ in range(6)]
    pair = []
    for model in (small_4bit("llama"), dense_twin(small_4bit("llama"))):
        eva = lora(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
        pair.append(peft.get_peft_model(model, eva))
        peft.initialize_lora_eva_weights(pair[-1], data, show_progress_bar=False)
    twin = dict(pair[1].named_parameters())
    found = {key: p for key, p in pair[0].named_parameters() if ".lora_A." in key}
    assert len(found) == 14
    for key, A in found.items():
        torch.testing.assert_close((A * twin[key]).sum(1).abs(), (A * A).sum(1), rtol=1e-2, atol=0, msg=key)
    ids = token_ids()
    assert torch.equal(logits(pair[0].eval(), ids), logits(small_4bit("llama"), ids))


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_counts_are_of_weights(name: str) -> None:
    fields = EXPERTS if name == "mixtral" else {"task_type": "SEQ_CLS"} if name == "bert" else {}
    model, twin = adapted_pair(name, lora(**fields))
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()
    for only in (False, True):
        assert model.num_parameters(only_trainable=only) == twin.num_parameters(only_trainable=only)
    assert adapted(small_4bit(name), lora(**fields), adapter_name="mine").get_nb_trainable_parameters() == (
        twin.get_nb_trainable_parameters()
    )


def test_printed_counts(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for model in adapted_pair("llama", lora()):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_their_own(how: str, tmp_path: Path) -> None:
    model = adapted(small_4bit("mixtral"), lora(target_modules=["q_proj"], target_parameters=[DOWN, GATE]))
    ids = token_ids()
    expected, count = logits(model, ids), model.num_parameters()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(twin, ids), expected)
    assert twin.num_parameters() == count
    for name, parameter in twin.named_parameters():
        if ".lora_B." in name:
            nn.init.zeros_(parameter)
    assert torch.equal(logits(twin, ids), logits(small_4bit("mixtral"), ids))
    assert torch.equal(logits(model, ids), expected)
    model.merge_adapter()
    assert torch.equal(logits(twin, ids), logits(small_4bit("mixtral"), ids))


def test_transformers_own_add_adapter_depends_on_its_version_of_peft() -> None:
    """transformers 5.25 asks for a PEFT that is not out; get_peft_model does not ask it."""
    version = tuple(int(part) for part in peft.__version__.split(".")[:3] if part.isdigit())
    wanted = tuple(int(part) for part in MIN_PEFT_VERSION.split(".")[:3])
    model = small_4bit("llama")
    if version >= wanted:
        model.add_adapter(lora(target_modules=["q_proj"]))
    else:
        with pytest.raises((ImportError, ValueError), match=r"(?i)peft"):
            model.add_adapter(lora(target_modules=["q_proj"]))
        model = peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    assert sum(isinstance(module, LoraLinear4bit) for module in model.modules()) == 2


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_layer_compiles_whole(fields: dict[str, Any]) -> None:
    layer = adapted(small_4bit("llama"), lora(**fields)).base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 256)
    outputs = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        y = run(x)
        y.square().mean().backward()
        outputs.append({"y": y, **{k: p.grad.clone() for k, p in layer.named_parameters() if p.grad is not None}})
    assert len(outputs[0]) >= 3
    assert_same(outputs[1], outputs[0], 1e-5)


def test_prepared_models_train() -> None:
    """PEFT's preparation casts biases and norms to float32, and not what the codes need."""
    before, ids = stored(small_4bit("qwen2", torch.bfloat16)), token_ids()
    model = peft.prepare_model_for_kbit_training(small_4bit("qwen2", torch.bfloat16))
    after = stored(model)
    for name, tensor in before.items():
        if tensor.dtype is torch.uint8 or "absmax" in name or "offset" in name:
            assert torch.equal(after[name], tensor)
            assert after[name].dtype is tensor.dtype
    wrapped = adapted(model, lora()).train()
    in_fp32 = nn.Module.float(small_4bit("qwen2", torch.bfloat16))
    twin = adapted(dense_twin(in_fp32, torch.float32), lora()).train()
    assert_same(results(wrapped, ids), results(twin, ids))
    frozen = stored(wrapped)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(loss := wrapped(input_ids=ids, labels=ids).loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert_same_bits(stored(wrapped), frozen)


TUNERS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "tinit": 1, "tfinal": 2, "deltaT": 1},
    "LN_TUNING": {"target_modules": ["norm"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 32},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 32},
    "VBLORA": {"vector_length": 64, "num_vectors": 32},
    **{name: {} for name in ("VERA", "LOHA", "LOKR", "HRA", "MISS", "ROAD", "RANDLORA", "FOURIERFT", "SHIRA", "BEFT")},
    **{name: {} for name in ("DELORA", "HIRA", "GRALORA", "PEANUT", "WAVEFT", "LILY", "DEFT", "PSOFT")},
}
WORK = ("ADALORA", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING")
REFUSALS = (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError)


@pytest.mark.parametrize("name", TUNERS)
def test_other_tuners_are_right_or_refused(name: str) -> None:
    """None computes something else, merged or not; the four that need no weight work."""
    config_class = next(c for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(kind).endswith(f".{name}"))
    takes = "target_modules" in inspect.signature(config_class).parameters
    targets = {"target_modules": ["q_proj", "v_proj"]} if takes else {}
    fields = {"task_type": "CAUSAL_LM", **targets, **TUNERS[name]}
    pair = []
    for model in (dense_twin(small_4bit("llama")), small_4bit("llama")):
        torch.manual_seed(2)
        try:
            pair.append(peft.get_peft_model(model, config_class(**fields)).eval())
        except REFUSALS:
            assert pair, "PEFT refuses the dense model"
            assert name not in WORK
            return
    twin, model = pair
    trained = {key: p for key, p in twin.named_parameters() if p.requires_grad}
    own = {key: p for key, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.add_(torch.randn_like(parameter) / 10)
            own[key].copy_(parameter)
    ids = token_ids()
    try:
        got = logits(model, ids)
    except REFUSALS:
        assert name not in WORK
        return
    expected, rows = logits(twin, ids), ids.shape[1]
    assert error(expected[:, -rows:], logits(small_4bit("llama"), ids)) > 1e-3
    assert error(got, expected) < 1e-4
    if not hasattr(twin, "merge_adapter"):
        return
    try:
        model.merge_adapter()
    except REFUSALS:
        return
    assert error(logits(model, ids), logits(twin, ids)) < 0.3
