"""Fused experts that become dense again: their config, and other threads that compute meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from qlora_ext import merge_adapter, quantize_model

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
IDS = torch.arange(5)[None]


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
def test_weights_quantized_one_after_the_other_give_back_the_first_config(first: str) -> None:
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    config = experts.config
    quantize_model(model, skip=["lm_head", first])
    quantize_model(model.model.layers, skip=[])
    assert experts.config is not config
    merge_adapter(model, dequantize=True)
    assert experts.config is config


def test_another_thread_finds_a_weight_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral()
    quantize_model(model)
    with torch.no_grad():
        wanted = model(IDS).logits
    got: list[Tensor] = []
    register = nn.Module.register_parameter

    def compute() -> None:
        with torch.no_grad():
            got.append(model(IDS).logits)

    def meanwhile(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        for step in (lambda: None, lambda: register(module, name, parameter)):
            step()
            thread = threading.Thread(target=compute)
            thread.start()
            thread.join()

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "register_parameter", meanwhile)
    merge_adapter(model, dequantize=True)
    assert len(got) == 4  # two weights, before and after each
    for logits in got:
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
