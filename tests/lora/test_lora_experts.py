"""Adapters on the fused experts of mixtures, in 4 bits: target_parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mixtures import BOTH, CONFIGS, TOKENS, adapted, decoded, lora_experts, mixture
from random_layers import state_bytes
from reference import assert_same
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_ext import (
    LoraConfig,
    add_adapter,
    delete_adapter,
    merge_adapter,
    quantize_model,
    set_adapter,
    unmerge_adapter,
)
from qlora_ext.experts import Experts4bit
from qlora_ext.lora.experts import LoraExperts

MODELS = sorted(CONFIGS)


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


def with_all_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Each token meets all four: of two that are nearly as likely, rounding may take the other."""
    routers = [module for module in model.modules() if hasattr(module, "top_k")]
    assert routers
    for router in routers:
        router.top_k = 4
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_with_the_updated_weights(name: str) -> None:
    """Logits and gradients against the model whose weights autograd updates."""
    model = adapted(name, use_rslora=True)
    layers = lora_experts(model)
    plain = decoded(model)
    assert layers.keys() == {n for n, p in plain.named_parameters() if p.dim() == 3}
    leaves: dict[str, tuple[Tensor, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for n, layer in layers.items():
        a, b = (t["default"].detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B))
        leaves[n], delta = (a, b), torch.einsum("eor,eri->eoi", b, a) * 8.0
        weights[n] = plain.get_parameter(n) + (delta.mT if layer.base_layer.is_transposed else delta)
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    same = embedded.detach().clone().requires_grad_()
    expected = functional_call(plain, weights, kwargs={"inputs_embeds": same}).logits
    loss_of(expected).backward()
    for _ in range(2):  # the second time with what the first has kept
        embedded.grad = None
        model.zero_grad()
        logits = model(inputs_embeds=embedded).logits
        loss_of(logits).backward()
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(embedded.grad, same.grad)
        for n, layer in layers.items():
            for table, leaf in zip((layer.lora_A, layer.lora_B), leaves[n], strict=True):
                torch.testing.assert_close(table["default"].grad, leaf.grad, atol=1e-6, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, expected)


def test_a_new_adapter_changes_nothing_and_trains_alone() -> None:
    model = quantize_model(mixture("qwen3"))
    before, experts = model(TOKENS).logits, state_bytes(model)
    add_adapter(model, LoraConfig(r=4, target_parameters=["down_proj"], rank_pattern={r"layers\.1.*down_proj": 2}))
    assert_same(model(TOKENS).logits, before)
    trained = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    at = "model.layers.{}.mlp.experts.quantized_down_proj_.stack.lora_{}.default"
    assert trained[at.format(0, "A")] == [4, 4, 32]
    assert trained[at.format(1, "B")] == [4, 64, 2]
    assert len([n for n in trained if "experts" in n]) == 4 < len(trained)
    delete_adapter(model, "default")
    assert state_bytes(model) == experts
    assert_same(model(TOKENS).logits, before)


def test_trains_with_checkpointing_and_accumulation() -> None:
    """Each step sees the parameters of the last one; gradients add up over the batches of a step."""
    losses, models = [], []
    for checkpointing in (False, True):
        model = adapted("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            for tokens in TOKENS:
                loss = model(tokens[None], labels=tokens[None]).loss
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        models.append(model.eval())
    assert losses[3] < losses[0]
    assert losses[:4] == losses[4:]
    first, second = models
    assert_same(first(TOKENS).logits, second(TOKENS).logits)
    copies = (copy.deepcopy(first), pickle.loads(pickle.dumps(first)))
    for other in copies:
        assert_same(other(TOKENS).logits, first(TOKENS).logits)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_tangents_raise(part: str) -> None:
    model = adapted("mixtral")
    name = f"model.layers.0.mlp.experts.quantized_down_proj_.stack.{part}.default"
    factor = model.get_parameter(name).detach()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(factor, torch.ones_like(factor))
        with pytest.raises(RuntimeError, match=r"^Experts4bit: forward mode AD: expected tensors without tangents"):
            functional_call(model, {name: dual}, (TOKENS,))


def test_several_adapters_switch_merge_and_unmerge() -> None:
    model = adapted("gpt_oss")
    one = model(TOKENS).logits
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["down_proj"]), "other")
    for layer in lora_experts(model).values():
        if "other" in layer.configs:
            nn.init.normal_(layer.lora_B["other"], std=0.1)
    two = model(TOKENS).logits
    set_adapter(model, ["default", "other"])
    both = model(TOKENS).logits
    set_adapter(model, "default")
    assert_same(model(TOKENS).logits, one)
    assert not torch.equal(one, two)
    set_adapter(model, ["default", "other"])
    storage = state_bytes(model)
    merge_adapter(model)
    merged = model(TOKENS).logits
    assert 0 < (merged - both).norm() < 0.5 * both.norm()
    assert state_bytes(model) == storage
    unmerge_adapter(model)
    assert_same(model(TOKENS).logits, both)
    weights = {n: layer.merged_weight() for n, layer in lora_experts(model).items()}
    merge_adapter(model, dequantize=True)
    assert not lora_experts(model)
    for n, weight in weights.items():
        assert_same(model.get_parameter(n).flatten(0, 1), weight)
    torch.testing.assert_close(model(TOKENS).logits, both)


def test_what_does_not_fit_is_named() -> None:
    for wrong, error, match in (
        ({"target_parameters": "down_proj"}, TypeError, "target_parameters: expected a list of str, got 'down_proj'"),
        ({"target_parameters": [1]}, TypeError, "target_parameters: expected a list of str"),
        ({"target_modules": []}, ValueError, "target_modules: expected at least one name"),
        ({"target_parameters": BOTH, "lora_dropout": 0.1}, ValueError, "lora_dropout: expected 0 with target_param"),
    ):
        with pytest.raises(error, match=match):
            LoraConfig(**wrong)
    config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match=r"target_parameters: .*in 4 bits \(here, by their last parts: none\), got"):
        add_adapter(mixture("mixtral"), config)
    with pytest.raises(ValueError, match=r"\(here, by their last parts: down_proj, gate_up_proj\), got 'experts.w1'"):
        add_adapter(quantize_model(mixture("mixtral")), LoraConfig(target_parameters=["experts.w1"]))
    with pytest.raises(ValueError, match=r"target_modules: expected names of linear layers"):
        add_adapter(quantize_model(mixture("mixtral")), LoraConfig(target_modules=["gate_up_proj"]))
    model = quantize_model(mixture("mixtral"))
    add_adapter(model, config)
    layer = model.model.layers[0].mlp.experts.down_proj.stack
    with torch.no_grad():
        layer.lora_B["default"][2, 3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"merge_adapter: model\.layers\.0\.mlp\.experts\.down_proj: expected finite"):
        merge_adapter(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_and_generates(dtype: torch.dtype) -> None:
    model = adapted("mixtral").to(dtype)
    if dtype == torch.bfloat16:
        with_all_experts(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        for tokens in TOKENS:  # gradients that add up, of two graphs
            loss_of(each(tokens[None]).logits.float()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    if dtype == torch.float32 or torch.__version__ >= "2.12":  # before, torch's own operations round elsewhere
        torch.testing.assert_close(gradients[1], gradients[0])
    generated = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    logits, exact = model(generated).logits, copy.deepcopy(model).float()(generated).logits
    merge_adapter(model, dequantize=True)
    if dtype == torch.float32:
        assert_same(model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0), generated)
    else:  # merged weights are rounded, too: of two tokens that are nearly as likely, the other may come
        assert (logits - exact).norm() <= 2 * (model(generated).logits - exact).norm()
        assert (model(generated).logits - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_computes_in_bfloat16(name: str) -> None:
    exact = with_all_experts(adapted(name))
    model = copy.deepcopy(exact).bfloat16()
    assert {layer.lora_A["default"].dtype for layer in lora_experts(model).values()} == {torch.float32}
    for each in (exact, model):
        loss_of(each(TOKENS).logits.float()).backward()
    for (_, near), (_, layer) in zip(lora_experts(model).items(), lora_experts(exact).items(), strict=True):
        for part in ("lora_A", "lora_B"):
            got, expected = (getattr(each, part)["default"].grad for each in (near, layer))
            assert (got - expected).norm() < 0.05 * expected.norm()
    for layer in lora_experts(model).values():
        assert layer.dequantize().dtype == torch.bfloat16
        assert layer.dequantize(torch.float16).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        merge_adapter(exact)
    with torch.inference_mode():
        assert (exact(TOKENS).logits - model(TOKENS).logits.float()).norm() < 0.5 * exact(TOKENS).logits.norm()


def test_what_is_merged_is_what_is_decoded() -> None:
    model = adapted("mixtral")
    experts = model.model.layers[0].mlp.experts.down_proj
    updated = experts.dequantize()
    a, b = (table["default"].detach() for table in (experts.stack.lora_A, experts.stack.lora_B))
    base = experts.stack.base_layer.dequantize().view(experts.shape)
    torch.testing.assert_close(updated, base + torch.einsum("eor,eri->eoi", b, a) * 4)
    with torch.autocast("cpu", torch.bfloat16):
        merge_adapter(model)
    merged = experts.dequantize()
    assert 0 < (merged - updated).norm() < 0.12 * updated.norm()
    ends = torch.tensor([0, 128, 128, 128], dtype=torch.int32)
    assert_same(F.grouped_mm(torch.eye(128), experts.transpose(-2, -1), offs=ends).T, merged[1])
    unmerge_adapter(model)
    assert_same(experts.dequantize(), updated)
    experts.quantize_(torch.zeros(experts.shape))
    assert not experts.stack.base_layer.dequantize().any()


def test_large_adapters_are_no_weights_left_as_they_are(recwarn: pytest.WarningsRecorder) -> None:
    model = adapted("mixtral", r=256)
    model.another = nn.Linear(64, 64)
    quantize_model(model)
    assert not [warning for warning in recwarn if "quantize_model" in str(warning.message)]


def test_a_factor_without_values_is_named() -> None:
    model = adapted("mixtral")
    table = model.model.layers[1].mlp.experts.down_proj.stack.lora_B
    table["default"] = nn.Parameter(table["default"].detach().to("meta"))
    with pytest.raises(ValueError, match=r"lora_B\.default: expected device cpu, got meta"):
        model(TOKENS)
    with pytest.raises(ValueError, match=r"lora_B\.default: expected device cpu, got meta"):
        merge_adapter(model)


def test_merged_mixtures_are_as_they_were() -> None:
    model, plain = adapted("gpt_oss"), mixture("gpt_oss")
    merge_adapter(model, dequantize=True)
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert list(module._parameters) == list(other._parameters)
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
            assert not getattr(module, hooks)


def test_a_starts_as_in_a_linear_layer() -> None:
    layer = LoraExperts(Experts4bit(torch.randn(4, 64, 64)).stack)
    layer.add_adapter("a", LoraConfig(r=8))
    assert 0.9 / 64**0.5 < layer.lora_A["a"].abs().max() <= 1 / 64**0.5
