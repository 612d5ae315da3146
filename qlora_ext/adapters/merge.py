"""Adapters in the weights of a whole model: merge them, and take them out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlora_ext.experts import Stack4bit, dequantize_experts, replaced_experts
from qlora_ext.functional import has_values
from qlora_ext.layer_hooks import check_not_hooked, check_not_offloaded, has_other_forward
from qlora_ext.layer_names import plain_modules
from qlora_ext.linear import dense
from qlora_ext.lora.experts import LoraExperts
from qlora_ext.lora.linear import LoraLinear, base_of
from qlora_ext.model_config import unmark_configs
from qlora_ext.model_layers import AnyLinear, check_not_merged, layers_of, lora_layers, replace_layers
from qlora_ext.sharded import check_whole, reshard
from qlora_ext.weight_4bit import Weight4bit


@torch.inference_mode(False)  # autograd saves no inference tensor, not even a frozen one
def merge_adapter(model: nn.Module, *, dequantize: bool = False) -> None:
    """Put the active adapters into the weights: W0 + sum of scaling B A.

    Args:
        model: a model with adapters.
        dequantize: False: each layer computes with one merged layer of its base's own kind (a 4-bit base is quantized
            again; so are experts) while the base is kept, so that `unmerge_adapter` restores it bit for bit. True: for
            serving, every LoraLinear and Linear4bit becomes a plain nn.Linear (or Conv1D, if it was one) in the base's
            dtype, rounded once from the float32 sum, and fused experts in 4 bits become a plain parameter; this cannot
            be undone. A base with hooks, or of a subclass with its own forward, keeps these, with W0 + B A as its
            weight.

    Merged or not, the state_dict holds the base and the adapters; a merged model that loads one merges them again.

    Raises:
        TypeError: a base has a weight in a form of others' (bitsandbytes' layers), or a forward not of its class.
        ValueError: no adapter is active (with dequantize there need be none); merged adapters; NaN or Inf; a layer that
            fully_shard has sharded, or in a module that accelerate has offloaded; with dequantize a layer with hooks,
            which would be lost. The model is then as it was.

    Source: LoRA, arXiv 2106.09685, section 4.1 ("no additional inference latency").
    """
    check_not_merged("merge_adapter", model)
    reshard(model)
    layers = layers_of(model)
    layers = {n: m for n, m in layers.items() if isinstance(m, LoraLinear) or dequantize}
    for name, module in plain_modules(model) if dequantize else ():
        if has_other_forward(module) and replaced_experts(module):
            check_not_hooked("merge_adapter", name, module)  # accelerate's forward knows their storage by its name
    check_whole("merge_adapter", layers, "save_adapter, and merge it in a model without fully_shard")
    own = ((n, m) for n, m in layers.items() if not has_other_forward(base_of(m)))  # merged_weight refuses the others
    check_not_offloaded("merge_adapter", model, own)
    if not dequantize:
        active = {name: layer for name, layer in lora_layers(model) if layer.active_adapters}
        if not active:
            raise ValueError("merge_adapter: model: expected an active adapter, got none")
        try:
            for name, adapted in active.items():
                adapted.merge(_merged_weight(name, adapted))
        except BaseException:
            for adapted in active.values():
                adapted.unmerge()
            raise
        return
    _check_dense(layers)
    del own, layers  # so that none is kept longer than it is needed

    def to_dense(_: str, module: nn.Module) -> nn.Module:
        if isinstance(module, (Stack4bit, LoraExperts)):
            return module
        if isinstance(module, LoraLinear):
            return dense(module.base_layer, module.merged_weight())
        return dense(module, module.dequantize(torch.float32)) if isinstance(module, Weight4bit) else module

    replace_layers(model, to_dense)
    for module in [module for module in model.modules() if replaced_experts(module)]:
        dequantize_experts(module)
    unmark_configs(model)


def _check_dense(layers: dict[str, AnyLinear]) -> None:
    """That each of these can become a dense layer, before any does."""
    for name, layer in layers.items():
        for lost in (layer, base_of(layer)):
            if isinstance(lost, (LoraLinear, Weight4bit)):
                check_not_hooked("merge_adapter", name, lost)
        if isinstance(layer, LoraLinear):
            _merged_weight(name, layer)


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`: the base is bit for bit what it was, the adapters are active again.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for _, layer in lora_layers(model) if layer.merged]
    if not merged:
        raise ValueError("unmerge_adapter: model: expected merged adapters, got none")
    for layer in merged:
        layer.unmerge()


def _merged_weight(name: str, layer: LoraLinear) -> Tensor:
    """layer.merged_weight(), or an error that names the layer; ValueError for NaN or Inf in it."""
    try:
        weight = layer.merged_weight()
    except (TypeError, ValueError) as error:
        raise type(error)(f"merge_adapter: {name}: {error}") from error
    # The largest number overflows first, and a NaN is the largest and the smallest.
    if has_values(weight) and not torch.stack(weight.aminmax()).to(layer.dtype).isfinite().all():
        adapters = ", ".join(layer.active_adapters)
        raise ValueError(f"merge_adapter: {name}: expected finite values with {adapters}, got NaN or Inf")
    return weight
