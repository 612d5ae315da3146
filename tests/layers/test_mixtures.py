"""Fused experts of transformers' mixtures in 4 bits, under the models' own forward."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from mixtures import CONFIGS, TOKENS, experts_of, mixture
from random_layers import names_of, state_bytes
from reference import assert_same
from tiny_model import load
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from qlora_ext import LoraConfig, add_adapter, merge_adapter, quantize_model, set_adapter


def gradients(model: PreTrainedModel, embedded: Tensor) -> tuple[Tensor, Tensor]:
    embedded = embedded.clone().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.square().mean().backward()
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("name", CONFIGS)
def test_models_compute_with_the_decoded_weights(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = mixture(name)
    fused = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    quantize_model(model)
    assert not [warning for warning in recwarn if "quantize_model" in str(warning.message)]
    assert experts_of(model).keys() == fused.keys() != set()
    plain = mixture(name)
    quantize_model(plain)
    merge_adapter(plain, dequantize=True)
    assert not experts_of(plain)
    for n, weight in fused.items():
        decoded = plain.get_parameter(n)
        assert (decoded.shape, decoded.dtype, decoded.requires_grad) == (weight.shape, weight.dtype, False)
        assert 0 < (decoded - weight).norm() < 0.12 * weight.norm()
    embedded = model.get_input_embeddings()(TOKENS).detach()
    for got, expected in zip(gradients(model, embedded), gradients(plain, embedded), strict=True):
        torch.testing.assert_close(got, expected)
    assert not any(module.training for module in model.modules())
    # The plain one by transformers' own implementation again, which can be chosen as before.
    for implementation in (None, "eager", "batched_mm"):
        if implementation:
            plain.set_experts_implementation(implementation)
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits)
    chosen = {m.config._experts_implementation for m in plain.modules() if hasattr(m, "is_transposed")}
    assert chosen == {"batched_mm"}


def test_nothing_decoded_stays_for_the_backward() -> None:
    model = quantize_model(mixture("mixtral"))
    embedded = model.get_input_embeddings()(TOKENS[:1, :8]).detach().requires_grad_()  # 16 rows for experts
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(inputs_embeds=embedded)
    matrix = 64 * 128
    sizes = [t.numel() for t in saved if t.is_floating_point()]
    assert 0 < max(sizes) < matrix


def test_adapters_train_over_experts() -> None:
    model = quantize_model(mixture("qwen3"))
    before = model(TOKENS).logits
    add_adapter(model, LoraConfig(r=4))
    experts = state_bytes(model.model.layers[0].mlp.experts)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not any("experts" in name for name in trained)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert state_bytes(model.model.layers[0].mlp.experts) == experts
    set_adapter(model, None)
    torch.testing.assert_close(model.eval()(TOKENS).logits, before)
    set_adapter(model, "default")
    trained_logits = model(TOKENS).logits
    merge_adapter(model, dequantize=True)
    torch.testing.assert_close(model(TOKENS).logits, trained_logits)
    with pytest.raises(ValueError, match="add_adapter: target_modules"):
        add_adapter(quantize_model(mixture("qwen3")), LoraConfig(target_modules=["gate_up_proj"]))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_copies_and_files_hold_the_same(name: str) -> None:
    model = quantize_model(mixture(name))
    expected = model(TOKENS).logits
    other = quantize_model(Auto.from_config(copy.deepcopy(CONFIGS[name])).eval())
    other.load_state_dict(model.state_dict())
    pickled = pickle.loads(pickle.dumps(model))
    for same in (copy.deepcopy(model), other, pickled):
        assert state_bytes(same) == state_bytes(model)
        assert_same(same(TOKENS).logits, expected)
    on_meta = quantize_model(copy.deepcopy(mixture(name)).to("meta"))
    on_meta.load_state_dict(model.state_dict(), assign=True)
    assert state_bytes(on_meta) == state_bytes(model)
    half = copy.deepcopy(model).bfloat16()
    assert {m.dequantize().dtype for m in experts_of(half).values()} == {torch.bfloat16}
    assert half(TOKENS).logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_is_one_graph_to_compile_and_to_export(name: str, dtype: torch.dtype) -> None:
    model = quantize_model(mixture(name).to(dtype))
    with torch.inference_mode():
        logits = model(TOKENS).logits
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(TOKENS).logits, logits)
    exported = torch.export.export(model, (TOKENS,), {"use_cache": False}).module()
    torch.testing.assert_close(exported(TOKENS, use_cache=False).logits, logits)


def test_generates_what_it_finds_most_likely() -> None:
    model = quantize_model(mixture("mixtral"))
    model.generation_config.eos_token_id = None  # any token may come, and is not the last
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_answer = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    assert with_answer.shape == (2, 25)
    logits = model(with_answer[:, :-1]).logits[:, 19:]  # of many tokens at once, and so rounded otherwise
    assert (logits.amax(-1) - logits.gather(-1, with_answer[:, 20:, None])[..., 0]).max() < 1e-5


@pytest.mark.parametrize("skip", ["experts", "model.layers.0.mlp.experts", "down_proj"])
def test_skip_names_experts(skip: str) -> None:
    model = mixture("mixtral")
    fused = {n for n, p in model.named_parameters() if p.dim() == 3}
    left = {n for n in fused if f".{skip}." in f".{n}." and (skip != "down_proj" or n.endswith("down_proj"))}
    most_stay = pytest.warns(UserWarning, match="196,608 weights stay as they are")
    with most_stay if skip == "experts" else nullcontext():
        quantize_model(model, skip=["lm_head", skip])
    assert experts_of(model).keys() == fused - left != fused
    assert {n for n, p in model.named_parameters() if p.dim() == 3} == left
    assert model(TOKENS).logits.isfinite().all()


def test_what_does_not_fit_is_named() -> None:
    model = mixture("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"quantize_model: model\.layers\.1\.mlp\.experts\.down_proj: .*NaN"):
        quantize_model(model)
    with pytest.raises(ValueError, match=r"quantize_model: model\.layers\.0\..*blocksize"):
        quantize_model(mixture("mixtral"), blocksize=0)


def test_what_is_tied_or_kept_in_fp32_is_left() -> None:
    model = mixture("mixtral")
    layers = model.model.layers
    layers[1].mlp.experts.down_proj = layers[0].mlp.experts.down_proj
    layers[1].mlp.experts._keep_in_fp32_modules = ["layers.0.mlp.experts.gate_up_proj"]
    with pytest.warns(UserWarning, match="weights stay as they are"):
        quantize_model(model)
    assert experts_of(model).keys() == {"model.layers.1.mlp.experts.gate_up_proj"}


def test_another_model_of_the_same_config_is_left_alone() -> None:
    config = copy.deepcopy(CONFIGS["mixtral"])
    model, other = Auto.from_config(config), Auto.from_config(config)
    before = config._experts_implementation
    quantize_model(model)
    assert config._experts_implementation == before != "eager"
    other.set_experts_implementation("batched_mm")
    assert model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_trainer_saves_and_goes_on(name: str, tmp_path: Path) -> None:
    """Of Qwen3-MoE's checkpoints transformers rearranges the experts."""
    data = [{"input_ids": row, "labels": row} for row in torch.arange(80).view(4, 20)]

    def trained(steps: int, folder: Path, resume: bool = False) -> dict[str, Tensor]:
        model = quantize_model(mixture(name))
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=4))
        how = {"per_device_train_batch_size": 2, "save_steps": 2, "lr_scheduler_type": "constant"}
        how |= {"use_cpu": True, "report_to": "none", "max_steps": steps}
        Trainer(model, TrainingArguments(str(folder), **how), train_dataset=data).train(resume_from_checkpoint=resume)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    trained(2, tmp_path / "parts")
    assert_same(trained(4, tmp_path / "parts", resume=True), trained(4, tmp_path / "whole"))


def test_offloaded_experts_are_fetched_and_what_is_offloaded_before_is_refused() -> None:
    model = quantize_model(mixture("mixtral"))
    expected = model(TOKENS).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_same(model(TOKENS).logits, expected)
    model = quantize_model(mixture("mixtral"))
    cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=["MixtralExperts"])
    assert_same(model(TOKENS).logits, expected)
    with pytest.raises(ValueError, match=r"merge_adapter: model\.layers\.0\.mlp\.experts: expected no hooks"):
        merge_adapter(model, dequantize=True)
    model = mixture("mixtral")
    cpu_offload(model.model.layers[0].mlp.experts, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"quantize_model: model\.layers\.0\.mlp\.experts: expected no hooks"):
        quantize_model(model)


def test_what_a_user_has_put_in_the_place_of_experts_stays() -> None:
    model = quantize_model(mixture("mixtral"))
    own = nn.Parameter(torch.randn(4, 64, 128))
    model.model.layers[0].mlp.experts.down_proj = own
    merge_adapter(model, dequantize=True)
    assert model.model.layers[0].mlp.experts.down_proj is own
    assert not experts_of(model)


def test_names() -> None:
    model = quantize_model(mixture("mixtral"))
    assert names_of(model, nn.Linear) == {"lm_head"}
    state = model.state_dict()
    assert state["model.layers.0.mlp.experts.quantized_gate_up_proj_.stack.weight"].shape == (4 * 256, 32)


def test_finetune_quantizes_fused_experts_as_they_are_read(tmp_path: Path) -> None:
    saved = mixture("gpt_oss")
    saved.save_pretrained(tmp_path)
    expected = quantize_model(mixture("gpt_oss"))
    options = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
    assert state_bytes(load(tmp_path, quantize=options)) == state_bytes(expected)
    with pytest.warns(UserWarning, match="98,304 weights stay as they are"):
        assert not experts_of(load(tmp_path, quantize={**options, "skip": ["experts"]}))
    assert experts_of(load(tmp_path, quantize={**options, "skip": ["down_proj"]}))
    with pytest.raises(ValueError, match="--skip: expected names of linear layers or fused experts, got 'expert'"):
        load(tmp_path, quantize={**options, "skip": ["expert"]})
