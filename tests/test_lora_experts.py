"""Adapters on the fused experts of mixtures, in 4 bits: target_parameters."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_command import data as data
from finetune_command import words
from layers import state_bytes
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from reference import assert_same
from safetensors.torch import load_file
from test_mixtures import CONFIGS, TOKENS, mixture
from tiny_model import tiny_tokenizer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import MixtralForCausalLM, PreTrainedModel

from qlora_ext import (
    LoraConfig,
    add_adapter,
    delete_adapter,
    load_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from qlora_ext.finetune import __main__ as cli
from qlora_ext.lora_experts import LoraExperts

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MODELS = sorted(CONFIGS)


def adapted(name: str, targets: list[str] = BOTH, **options: Any) -> PreTrainedModel:
    """A mixture in 4 bits with an adapter of random values on its experts."""
    model = quantize_model(mixture(name))
    add_adapter(model, LoraConfig(**{"r": 4, "target_modules": [], "target_parameters": targets} | options))
    torch.manual_seed(1)
    for layer in lora_experts(model).values():
        nn.init.normal_(layer.lora_B["default"], std=0.1)
    return model


def lora_experts(model: nn.Module) -> dict[str, LoraExperts]:
    """By the names of the weights."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraExperts)}
    return {n.replace("quantized_", "").removesuffix("_.stack"): m for n, m in found.items()}


def decoded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its base's weights in 32 bits, without adapters."""
    plain = copy.deepcopy(model)
    set_adapter(plain, None)
    merge_adapter(plain, dequantize=True)
    return plain


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


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
    assert all(not layer._split for layer in lora_experts(pickle.loads(pickle.dumps(first))).values())


def test_all_matrices_of_a_factor_share_one_backward() -> None:
    """Else the backward would make a tensor of the whole factor's size for each expert."""
    layer = next(iter(lora_experts(adapted("mixtral")).values()))
    nodes = [layer(i).A[0].grad_fn for i in range(4)]
    assert all(node is nodes[0] for node in nodes)
    with torch.no_grad():
        layer.lora_A["default"] += 1
    assert layer(0).A[0].grad_fn is not nodes[0]
    layer.lora_A["default"].data = torch.zeros(4, 4, 64)
    assert not layer(0).A[0].any()


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


@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3", "gpt_oss"])
def test_peft_reads_what_is_saved(name: str, targets: list[str], tmp_path: Path) -> None:
    model = adapted(name, targets, target_modules=["q_proj"], alpha_pattern={"down_proj": 32})
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(decoded(model), tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)
    again = quantize_model(mixture(name))
    load_adapter(again, tmp_path)
    assert_same(again(TOKENS).logits, model(TOKENS).logits)
    save_adapter(again, tmp_path / "again")
    assert_same(
        load_file(tmp_path / "again/adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    )


@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "qwen3", "gpt_oss"])
def test_what_peft_saves_is_read(name: str, targets: list[str], tmp_path: Path) -> None:
    model = quantize_model(mixture(name))
    config = PeftConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
    theirs = get_peft_model(decoded_without_adapters(model), config)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits)


def decoded_without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    plain = copy.deepcopy(model)
    merge_adapter(plain, dequantize=True)
    return plain


def test_finetune_trains_saves_and_resumes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = copy.deepcopy(CONFIGS["mixtral"])
    config.vocab_size = 258
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run = {"model": tmp_path / "model", "data": data, "method": "qlora", "batch-size": 4, "lr": 1e-2, "save-steps": 2}
    run |= {"target-parameters": ",".join(BOTH), "schedule": "constant", "samples": 0, "eval-examples": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(words({**run, "output": whole, "steps": 4})) == 0
    assert cli.main(words({**run, "output": parts, "steps": 2})) == 0
    capsys.readouterr()
    again = {**run, "output": parts, "steps": 4, "resume": True}
    assert cli.main(words({**again, "target-parameters": BOTH[0]})) == 2
    assert "--resume: --target-parameters: expected" in capsys.readouterr().err
    assert cli.main(words(again)) == 0
    tensors = load_file(whole / "adapter_model.safetensors")
    assert_same(load_file(parts / "adapter_model.safetensors"), tensors)
    assert tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].any()
    assert json.loads((whole / "adapter_config.json").read_text())["target_parameters"] == BOTH


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_adapter(adapted("mixtral"), tmp_path)
    for model, got in (
        (mixture("mixtral"), "down_proj"),
        (quantize_model(mixture("mixtral"), skip=["lm_head", "gate_up_proj"]), "gate_up_proj"),
    ):
        expected = rf"target_parameters: expected .* in 4 bits.*got model\.layers\.0\.mlp\.experts\.{got}"
        with pytest.raises(ValueError, match=expected):
            load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"gate_up_proj\.lora_B: expected shape \[64, 16\], got \[256, 16\]"):
        load_adapter(quantize_model(mixture("qwen3")), tmp_path)


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


def test_compiles_and_generates() -> None:
    model = adapted("mixtral")
    logits = model(TOKENS).logits
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(TOKENS).logits, logits)
    generated = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    merge_adapter(model, dequantize=True)
    assert_same(model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0), generated)
