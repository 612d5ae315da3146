"""Tiny models of transformers: saved, loaded in 4 bits, and the dense model that computes with the same weights; both
with the same adapters of PEFT."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from qlora_ext import NF4Config

VOCABULARY = 200
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
HEADS = {"num_key_value_heads": 2, "tie_word_embeddings": False}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, **HEADS, intermediate_size=256),
    "qwen2": lambda: Qwen2Config(**SIZES, **HEADS, intermediate_size=256),  # its q, k and v have biases
    "gpt2": lambda: GPT2Config(**GPT2, vocab_size=VOCABULARY),  # its layers are Conv1D
    "mixtral": lambda: MixtralConfig(**SIZES, **HEADS, intermediate_size=128, num_local_experts=4),
    "bert": lambda: BertConfig(**SIZES, intermediate_size=256, num_labels=3),
}


def auto_class(name: str) -> Any:
    return AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM


def save_small_model(name: str, folder: Path) -> Path:
    """A random model with weights large enough that each layer counts, biases included; returns the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class(name).from_config(CONFIGS[name]())
        for key, parameter in model.named_parameters():
            if key.endswith(".bias"):
                nn.init.normal_(parameter, std=0.1)
            elif "norm" not in key.lower() and "ln_" not in key:
                nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


def load_4bit(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The model in that folder, in 4 bits; options as NF4Config's."""
    model = auto_class(name).from_pretrained(folder, dtype=dtype, quantization_config=NF4Config(**options))
    return model.eval()


@functools.cache
def _loaded(name: str, dtype: torch.dtype) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        return load_4bit(name, save_small_model(name, Path(folder)), dtype)


def small_4bit(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of one's own, in 4 bits."""
    return copy.deepcopy(_loaded(name, dtype))


def dense_twin(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A dense model with the very weights that the 4-bit one decodes to, and with its buffers as they are."""
    twin = copy.deepcopy(model).dequantize(dtype)
    for name, module in twin.named_modules():
        for key in module._buffers:
            module._buffers[key] = copy.deepcopy(model.get_submodule(name)._buffers[key])
    return twin


def token_ids(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **fields})


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give adapters random values, the same to models of the same adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1 + torch.randn(parameter.shape) / 8).add_(torch.randn(parameter.shape) / 20)


def adapted(model: nn.Module, *configs: peft.LoraConfig, **options: Any) -> Any:
    """The model with random adapters: "default", which is active, and "other"."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        wrapped: Any = peft.get_peft_model(model, copy.deepcopy(configs[0]), **options)
        for config in configs[1:]:
            wrapped.add_adapter("other", copy.deepcopy(config))
    randomize(wrapped)
    return wrapped.eval()


def adapted_pair(name: str, *configs: peft.LoraConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The 4-bit model and its dense twin, with the same adapters."""
    model = small_4bit(name, dtype)
    twin = dense_twin(model)
    return adapted(model, *configs), adapted(twin, *configs)


def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=ids, **inputs).logits
    return y


def results(model: Any, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """The logits, and the gradients of what is trained and of the embedded input."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    y = model(inputs_embeds=embedded, **inputs).logits
    (y.float() ** 3).mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": y.detach(), "input": embedded.grad, **trained}


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == expected.keys()
    errors = {name: error(got[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that is not an adapter's."""
    return {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=name)
