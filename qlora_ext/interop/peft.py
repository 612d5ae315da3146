"""PEFT's LoRA on 4-bit layers and experts: importing this module teaches PEFT both.

PEFT asks one function for the layer that goes around another (`LoraModel._create_new_module`), one for the parameters
that are adapted without a layer of their own (`_inject_parameters`), and one for the float weight of a quantized layer
(`dequantize_module_weight`). Each is extended here; all else (configs, files, switching, mixed batches) is PEFT's own.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import peft.tuners.lora.layer as peft_layer
import peft.utils.integrations as peft_integrations
import torch
from peft import PeftModel
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.variants import ALoraLinearVariant, ArrowLinearVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from qlora_ext.dense_linear import oriented
from qlora_ext.experts import Experts4bit, replaced_experts
from qlora_ext.interop.checkpoint_files import read_folder
from qlora_ext.layer_hooks import is_hooked
from qlora_ext.linear import Linear4bit
from qlora_ext.weight_4bit import Weight4bit

READ_WEIGHT = ("orthogonal", "olora", "pissa")  # initialisations that look at the base's weight
VARIANTS = (ALoraLinearVariant, ArrowLinearVariant, DoraLinearVariant)


class LoraLinear4bit(peft_layer.Linear):  # type: ignore[misc]
    """PEFT's LoRA layer around a Linear4bit: plain LoRA in one fused op, forward and backward.

    DoRA, aLoRA, Arrow and mixed batches compute as PEFT does, from the decoded weight where they need it. A merge
    stores the sum in 4 bits again and keeps the bytes it replaces, so `unmerge` gives them back bit for bit.

    Raises:
        ValueError: a variant or an initialisation of LoRA that cannot be had on a 4-bit weight.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        self._unmerged: dict[str, Any] | None = None
        if config.fan_in_fan_out:  # the 4-bit weight is [out, in], also where it was a Conv1D's
            config = copy.copy(config)
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None and not isinstance(variant, VARIANTS):
            got = type(variant).__name__
            raise ValueError(f"Linear4bit: LoraConfig: expected plain LoRA, DoRA, aLoRA or Arrow, got {got}")
        return variant

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        init = config.init_lora_weights
        reads_weight = isinstance(init, str) and init.lower().startswith(READ_WEIGHT)
        if isinstance(init, str) and not reads_weight and init.lower() not in ("gaussian", "eva"):
            expected = f"true, false, gaussian, eva, {', '.join(READ_WEIGHT)}"
            how = " (replace_lora_weights_loftq of qlora_ext.interop.peft needs the float weights)" * (init == "loftq")
            raise ValueError(f"Linear4bit: init_lora_weights: expected {expected}, got {init!r}{how}")
        if not reads_weight:
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            return
        base = self.get_base_layer()
        decoded = base.dequantize(torch.float32)
        before = decoded.clone()
        layer = self.base_layer
        self._modules["base_layer"] = _dense_view(base, decoded)
        try:
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            after = self.base_layer.weight
        finally:
            self._modules["base_layer"] = layer
        if not torch.equal(before, after):  # the adapter has taken its part out of the base
            base.quantize_(oriented(base.dense_class, after.detach()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out], as PEFT's `lora.Linear`."""
        fused = None if args or any(value is not None for value in kwargs.values()) else self._fused_adapters()
        if fused is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        names, A, B, scaling, keep = fused
        base: Linear4bit = self._modules["base_layer"]
        seed = torch.randint(2**63 - 1, (len(keep),), device=A[0].device) if keep else None
        y = base.forward_with_adapters(x, A, B, scaling, keep, seed)
        for name in names:
            if self.lora_bias[name]:
                y = y + (self.lora_B[name].bias * self.scaling[name]).to(y.dtype)
        return y

    def _fused_adapters(self) -> tuple[list[str], list[Tensor], list[Tensor], list[float], list[float]] | None:
        """The active adapters as the fused op takes them; None where it cannot compute what PEFT would."""
        parts: Any = self._modules  # without __getattr__, which takes longer than all else around a small product
        base, tables = parts["base_layer"], (parts["lora_A"]._modules, parts["lora_B"]._modules)
        if self._disable_adapters or self.merged_adapters or not isinstance(base, Linear4bit) or is_hooked(base):
            return None
        names = [name for name in self.active_adapters if name in tables[0]]
        layers = [(tables[0][name], tables[1][name]) for name in names]
        if not names or any(name in self.lora_variant for name in names):
            return None
        if any("weight" not in each._parameters or is_hooked(each) for pair in layers for each in pair):
            return None
        scaling = [self.scaling[name] for name in names]
        dropouts = [parts["lora_dropout"]._modules[name] for name in names]
        keep = [1 - each.p if isinstance(each, nn.Dropout) and each.training else 1.0 for each in dropouts]
        if not all(isinstance(each, (int, float)) for each in scaling):  # a tensor, of a compiled hotswap
            return None
        if all(k == 1 for k in keep):
            keep = []
        else:
            scaling = [s / k if k else 0.0 for s, k in zip(scaling, keep, strict=True)]
        A, B = ([pair[i]._parameters["weight"] for pair in layers] for i in (0, 1))
        return names, A, B, scaling, keep

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, and store the sum in 4 bits; arguments as PEFT's."""
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit):  # dequantized since
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        current = _tensors_of(base)
        before = self._unmerged or current
        _restore(base, before)  # so that what has been merged already is rounded once, together with the rest
        try:
            weight, bias = self._sum([*filter(self.lora_A.__contains__, self.merged_adapters), *names])
            base.quantize_(oriented(base.dense_class, weight.detach()))  # ValueError for NaN and Inf
        except BaseException:
            _restore(base, current)
            raise
        if bias is not base.bias:
            base.bias = nn.Parameter(bias.detach().to(base.dtype), requires_grad=False)
        self._unmerged = before
        self.merged_adapters.extend(names)

    def _sum(self, names: list[str]) -> tuple[Tensor, Any]:
        """The base's weight [out, in] and bias with these adapters, in the order in which PEFT would merge them."""
        base = self.get_base_layer()
        original: Tensor = base.dequantize(torch.float32)
        weight, bias = original, base.bias
        for name in names:
            variant, delta = self.lora_variant.get(name), self.get_delta_weight(name)
            if isinstance(variant, DoraLinearVariant):
                magnitude = self.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(original, delta, scaling=1)
                weight = (magnitude.weight / norm)[:, None] * (weight + delta)
            elif variant is not None:
                weight = variant.merge_safe(self, name, weight)  # raises: aLoRA and Arrow cannot be merged
            else:
                weight = weight + delta
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError("Linear4bit: lora_bias: expected a base layer with a bias, got one without")
                bias = bias + self.lora_B[name].bias * self.scaling[name]
                if not bias.isfinite().all():
                    raise ValueError(f"Linear4bit: lora_bias: expected finite values with {name}, got NaN or Inf")
        return weight, bias

    def unmerge(self) -> None:
        """Give the layer the very tensors that it had before the first merge."""
        if self._unmerged is None:
            super().unmerge()
            return
        self.merged_adapters.clear()
        _restore(self.get_base_layer(), self._unmerged)
        self._unmerged = None

    def __repr__(self) -> str:
        return f"lora.{nn.Module.__repr__(self)}"


class ParamWrapper(peft_layer.ParamWrapper):  # type: ignore[misc]
    """PEFT's LoRA on a weight of fused experts (`target_parameters`) that is in 4 bits: grouped products, no decoding.

    PEFT knows wrappers of parameters by this class's name.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, **kwargs: Any) -> None:
        self._unmerged: dict[str, Any] | None = None
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, **kwargs)
        self._hook = self.get_param().stack.register_forward_pre_hook(self._with_adapters, with_kwargs=True)

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        init = config.init_lora_weights
        if isinstance(init, str) and init.lower() not in ("gaussian", "eva"):
            raise ValueError(f"Experts4bit: init_lora_weights: expected true, false, gaussian or eva, got {init!r}")
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def _with_adapters(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The stack's arguments with the active adapters."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        A = [self.lora_A[name].weight.unflatten(0, (self.num_experts, -1)) for name in names]
        B = [self.lora_B[name].weight.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1) for name in names]
        scaling = [self.scaling[name] for name in names]
        return args, kwargs | {"A": A, "B": [b.contiguous() for b in B], "scaling": scaling}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.base_layer(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As LoraLinear4bit's."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        experts = self.get_param()
        current = _tensors_of(experts.base)
        before = self._unmerged or current
        _restore(experts.base, before)
        try:
            weight = experts.dequantize(torch.float32)
            for name in (*filter(self.lora_A.__contains__, self.merged_adapters), *names):
                weight = weight + self.get_delta_weight(name).float()
            experts.quantize_(weight.detach())
        except BaseException:
            _restore(experts.base, current)
            raise
        self._unmerged = before
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """As LoraLinear4bit's."""
        self.merged_adapters.clear()
        if self._unmerged is not None:
            _restore(self.get_param().base, self._unmerged)
        self._unmerged = None

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> Any:
        wrapper: Any = self
        base = super().unload_and_optionally_merge_module(*args, **kwargs)
        while isinstance(wrapper, ParamWrapper):
            wrapper._hook.remove()
            wrapper = wrapper.base_layer
        return base


@torch.no_grad()
def replace_lora_weights_loftq(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Start an adapter from what 4 bits lose of each weight: the best A and B for W - Q(W), by a singular value
    decomposition. PEFT's function of this name does so for bitsandbytes' layers.

    Args:
        model: of `get_peft_model`, with the adapter on Linear4bit layers.
        folder: the model's, with its float weights in safetensors, of which one at a time is read.
        adapter_name: of the adapter.

    Raises:
        ValueError: no layer of the model is in 4 bits with this adapter, or the folder has no weight for one.

    Source: LoftQ, arXiv 2310.08659, algorithm 1 with one step.
    """
    stored = read_folder(Path(folder))
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear4bit) and adapter_name in m.lora_A]
    if not layers:
        raise ValueError(f"replace_lora_weights_loftq: model: expected {adapter_name!r} on 4-bit layers, got none")
    for name, layer in layers:
        parts = f"{name}.weight".split(".")  # the files may leave out what is in front
        found = next((stored[key] for i in range(len(parts)) if (key := ".".join(parts[i:])) in stored), None)
        if found is None:
            raise ValueError(f"replace_lora_weights_loftq: {name}: expected its weight in {folder}, got none")
        base, r = layer.get_base_layer(), layer.r[adapter_name]
        weight = oriented(base.dense_class, found[...]).to(base.weight.device, torch.float32)
        U, S, Vh = torch.linalg.svd(weight - base.dequantize(torch.float32), full_matrices=False)
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        A.copy_(S[:r].sqrt()[:, None] * Vh[:r])
        B.copy_(U[:, :r] * S[:r].sqrt() / layer.scaling[adapter_name])


def _dense_view(layer: Linear4bit, weight: Tensor) -> Any:
    """An nn.Linear with this weight [out, in], made past PEFT's init_empty_weights, which puts parameters on meta."""
    view: Any = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(view)
    view.in_features, view.out_features = layer.in_features, layer.out_features
    view._parameters.update(weight=nn.Parameter(weight, requires_grad=False), bias=layer.bias)
    return view


def _tensors_of(layer: Weight4bit) -> dict[str, Any]:
    return layer._storage() | {"bias": layer.bias}


def _restore(layer: Weight4bit, tensors: dict[str, Any] | None) -> None:
    """Give the layer these tensors, on the device where it is by now."""
    for name, tensor in (tensors or {}).items():
        if tensor is not None and tensor.device != layer.weight.device:
            tensor.data = tensor.data.to(layer.weight.device)
        setattr(layer, name, tensor)


_create_new_module = LoraModel._create_new_module
_inject_parameters = LoraModel._inject_parameters
_replace_module = BaseTuner._replace_module
_count_parameters = PeftModel.get_nb_trainable_parameters
_dequantize_module_weight = peft_integrations.dequantize_module_weight


def _create(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    parameter = kwargs.get("parameter_name")
    if parameter is None and isinstance(base, Linear4bit):
        return LoraLinear4bit(target, adapter_name, config=config, **kwargs)
    if parameter is not None and isinstance(getattr(base, parameter, None), Experts4bit):
        return ParamWrapper(target, adapter_name, config=config, **kwargs)
    module: nn.Module = _create_new_module(config, adapter_name, target, **kwargs)
    return module


def _inject(self: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's, which looks for parameters: those that experts in 4 bits have replaced stand there meanwhile, empty."""
    places = [(m._parameters, experts) for m in self.model.modules() for experts in replaced_experts(m).values()]
    for parameters, experts in places:
        parameters[experts.replaced[0]] = nn.Parameter(torch.empty(0, device=experts.device), requires_grad=False)
    try:
        return _inject_parameters(self, *args, **kwargs)
    finally:
        for parameters, experts in places:
            parameters[experts.replaced[0]] = None


def _replace(self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
    """PEFT's, of the tuners that have none of their own: these compute with the weight in ways not checked here."""
    if isinstance(child, Linear4bit):
        raise ValueError(f"Linear4bit: expected LoRA or AdaLoRA, got {type(self).__name__} for {child_name}")
    _replace_module(self, parent, child_name, new_module, child)


def _dequantize(module: nn.Module) -> Any:
    """PEFT's, which gives the weight of a layer as floats."""
    return module.dequantize() if isinstance(module, Linear4bit) else _dequantize_module_weight(module)


def _count(self: Any) -> tuple[int, int]:
    """PEFT's numbers of trainable and of all parameters, with weights, not bytes, counted in 4-bit layers."""
    trainable, total = _count_parameters(self)
    layers = [module for module in self.modules() if isinstance(module, Weight4bit)]
    return trainable, total + sum(m.in_features * m.out_features - m.weight.numel() - m.absmax.numel() for m in layers)


LoraModel._create_new_module = staticmethod(_create)
LoraModel._inject_parameters = _inject
BaseTuner._replace_module = _replace
PeftModel.get_nb_trainable_parameters = _count
for _module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"]:
    if getattr(_module, "dequantize_module_weight", None) is _dequantize_module_weight:
        _module.dequantize_module_weight = _dequantize  # type: ignore[attr-defined]
