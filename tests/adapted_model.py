"""Tiny quantized llamas with adapters, and what may differ between two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_layers import randomize_adapters, state_bytes
from tiny_model import tiny_config
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaForCausalLM

from qlora_ext import LoraConfig, LoraLinear, add_adapter, quantize_model

TOKENS = torch.arange(12).view(2, 6)


def with_compiled(name: str) -> Callable[[nn.Module], nn.Module]:
    """What puts torch.compile's module in the place of the one of this name."""

    def wrap(model: nn.Module) -> nn.Module:
        model.set_submodule(name, torch.compile(model.get_submodule(name), backend="eager"))
        return model

    return wrap


def distributed_data_parallel(model: nn.Module) -> nn.Module:
    """Of one process, which no other test then is part of."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    finally:
        distributed.destroy_process_group()


def with_checkpointed(model: nn.Module) -> nn.Module:
    """As torch's apply_activation_checkpointing leaves it."""
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


class Fabric(nn.Module):
    """As Lightning's Fabric wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._forward_module = self._original_module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward_module(*args, **kwargs)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled-block": with_compiled("model.layers.0"),
    "compiled-linear": with_compiled("model.layers.0.self_attn.q_proj"),
    "data-parallel": nn.DataParallel,
    "distributed": distributed_data_parallel,
    "checkpointed": with_checkpointed,
    "fabric": Fabric,
    "several": lambda model: nn.DataParallel(torch.compile(with_compiled("model.layers.1")(model), backend="eager")),
}
by_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def base_model() -> LlamaForCausalLM:
    """The same weights each time, so that an adapter of one fits another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quantize_model(LlamaForCausalLM(tiny_config()).eval())


def with_adapter(name: str = "default", **fields: Any) -> LlamaForCausalLM:
    """The base model with an adapter that is not zero."""
    model = base_model()
    add_adapter(model, LoraConfig(**fields), name)
    randomize_adapters(model)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def everything(model: nn.Module) -> tuple[object, ...]:
    """All of a model that an operation on its adapters may change."""
    lora = [module for module in model.modules() if isinstance(module, LoraLinear)]
    adapters = [(layer.active_adapters, dict(layer.scaling), dict(layer.configs), layer.merged) for layer in lora]
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return kinds, state_bytes(model), trainable(model), adapters
