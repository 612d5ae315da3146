"""Models with an adapter and modules that are trained whole beside it, and what their files hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import randomize_adapters
from safetensors.torch import load_file
from tiny_model import tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from qlora_ext import LoraConfig, add_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = "model.embed_tokens"


def make(kind: type[nn.Module], **changes: Any) -> nn.Module:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(tiny_config(pad_token_id=0, **changes)).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "head": (lambda: make(LlamaForSequenceClassification), ["score"]),
    "embeddings": (lambda: make(LlamaForCausalLM, tie_word_embeddings=False), [EMBEDDINGS]),
    "both": (lambda: make(LlamaForCausalLM, tie_word_embeddings=False), ["lm_head", EMBEDDINGS]),
    "tied": (lambda: make(LlamaForCausalLM), ["lm_head", EMBEDDINGS]),
    "norms": (lambda: make(LlamaForCausalLM), ["model.layers.1.input_layernorm", "model.norm"]),
}
by_model = pytest.mark.parametrize(("build", "names"), MODELS.values(), ids=MODELS)


def change(module: nn.Module) -> nn.Module:
    """As training does."""
    for parameter in module.requires_grad_(True).parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def trained(base: nn.Module, names: list[str], targets: list[str] | None = None) -> nn.Module:
    model = copy.deepcopy(base)
    add_adapter(model, LoraConfig(r=2, target_modules=targets or ["q_proj", "up_proj"]))
    randomize_adapters(model)
    for name in names:
        change(model.get_submodule(name))
    return model


def others(folder: Path) -> dict[str, Tensor]:
    """What is in the file beside the adapter, by plain name."""
    tensors = load_file(folder / WEIGHTS)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if ".lora_" not in key}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


class Block(nn.Module):
    """It owns a parameter and a buffer, and has a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.inner = nn.Linear(8, 8)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.to(x.dtype) * self.count


class WithExtraState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def get_extra_state(self) -> int:
        return 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.block = Block()
        self.list = nn.ParameterList([torch.ones(8)])
        self.offset = nn.Parameter(torch.zeros(8))
        self.frozen = nn.ModuleDict({"block": Block(), "extra": WithExtraState()})

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen["block"](self.block(self.proj(x)) * self.list[0] + self.offset)


def adapted() -> Model:
    torch.manual_seed(0)
    model = Model()
    add_adapter(model, LoraConfig(r=2, target_modules=["proj"]))
    randomize_adapters(model)
    return model
