"""NF4Config: transformers' quantization_config for this library, and the quantizer behind it.

Importing this module registers both under the method name "qlora_ext", and teaches PEFT the 4-bit layer if PEFT is
installed. A model saved in 4 bits names that method in its config.json, so a script that loads it imports NF4Config.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_ext.adapters.merge import merge_adapter
from qlora_ext.experts import quantize_experts
from qlora_ext.interop.checkpoint_files import read_header
from qlora_ext.interop.nf4_options import METHOD, NF4Options
from qlora_ext.linear import Linear4bit
from qlora_ext.model_layers import HEADS, output_head
from qlora_ext.quantize import weights_to_quantize
from qlora_ext.weight_4bit import Weight4bit


class NF4Config(NF4Options, QuantizationConfigMixin):  # type: ignore[misc]
    __doc__ = NF4Options.__doc__


class NF4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Stores each weight in 4 bits as it is read: at the peak there are the 4-bit model and one dense tensor.

    A model read from 4-bit files gets its empty 4-bit layers first, and then their tensors like any other's.
    """

    quantization_config: NF4Config
    quantized_element_size = 0.5
    is_trainable = True
    is_compileable = True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "NF4Config: device_map: expected devices and cpu, got disk, from which no 4-bit layer reads"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Without one: the GPU, if there is one, as bitsandbytes' users know it."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        self._places = _places(model)
        names = weights_to_quantize(model, skip=self.quantization_config.skip)
        self._dense = {name for name in names if name not in tied}
        if not self._dense:
            warnings.warn(
                f"NF4Config: {type(model).__name__} has no linear layer to quantize", UserWarning, stacklevel=2
            )
        if self.pre_quantized:
            for name in self._dense:
                self.store(model, name, model.get_parameter(name))
            _check_files(checkpoint_files or (), model)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return not self.pre_quantized and param_name in self._dense

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def store(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """Put the 4-bit form of this weight, of a layer or of fused experts, into the model."""
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        # Not by setattr: until it is quantized the dense weight must be found nowhere else.
        module._parameters[attribute] = nn.Parameter(weight, requires_grad=False)
        if weight.dim() == 3:
            quantize_experts(module, attribute, **self.quantization_config.options)
            stored: Weight4bit = getattr(module, attribute).base
        else:
            stored = Linear4bit.from_linear(module, **self.quantization_config.options)  # type: ignore[arg-type]
            for parent, key in self._places[id(module)]:
                parent._modules[key] = stored
            self._places[id(stored)] = self._places[id(module)]
        stored._is_hf_initialized = True  # type: ignore[assignment]  # else transformers draws what it takes for a new layer's weight
        if not weight.is_meta:
            for tensor in stored._storage().values():
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            self._dense.discard(name)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _check_loaded(model)
        if not self.pre_quantized and self._dense:  # the files had no weight for them: they are new, and have to train
            config = self.quantization_config
            new = sorted(name.removesuffix(".weight") for name in self._dense)
            left = config.modules_to_not_convert
            config.modules_to_not_convert = [*([*HEADS, *output_head(model)] if left is None else left), *new]
        del self._places
        model.is_loaded_in_4bit = True
        model.num_parameters = functools.partial(_num_parameters, model)
        return model

    def is_serializable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        merge_adapter(model, dequantize=True)
        del model.is_loaded_in_4bit, model.num_parameters
        # The layers have the model's dtype. Another is for parameters alone: buffers, as RoPE's, stay as they are.
        for parameter in model.parameters() if dtype not in (None, model.config.dtype) else ():
            parameter.data = parameter.data.to(dtype)
        return model


class _Quantize(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: NF4Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Store those weights that are to be in 4 bits; the result is the others, for transformers to set."""
        rest = {}
        for name, value in input_dict.items():
            if self.quantizer.param_needs_quantization(model, name):
                weight = value[0] if isinstance(value, list) else value
                try:
                    self.quantizer.store(model, name, weight)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"NF4Config: {name}: {error}") from error
                missing_keys.discard(name)
            else:
                rest[name] = value
        return rest


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module stands: its parents, and its names in them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    return places


def _check_files(files: Iterable[str], model: nn.Module) -> None:
    """Raise ValueError, before anything is loaded, if a file is damaged, or has not all tensors of a 4-bit layer."""
    paths = [Path(file) for file in files if str(file).endswith(".safetensors")]
    tensors = {name: stored for path in paths for name, stored in read_header(path).items()}
    for layer, module in model.named_modules():
        if isinstance(module, Weight4bit):
            own = {f"{layer}.{key}": tensor for key, tensor in module._storage().items()}
            there = [tensors[name] for name in own if name in tensors]
            for name, tensor in own.items() if there else ():  # transformers may know the layer by another name
                if name not in tensors:
                    at = there[0].path.name
                    raise ValueError(f"NF4Config: {at}: {name}: expected it beside {there[0].name}, got none")
                stored = tensors[name]
                if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                    expected, got = f"{tensor.dtype} {list(tensor.shape)}", f"{stored.dtype} {list(stored.shape)}"
                    raise ValueError(f"NF4Config: {stored.path.name}: {name}: expected {expected}, got {got}")


def _num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """transformers' `num_parameters`, with weights, not bytes, counted in 4-bit layers."""
    counted: dict[int, int] = {}  # one pass, as transformers' Trainer asks at each step
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or (only_trainable and not p.requires_grad):
                continue
            weights = p.numel()
            if isinstance(module, Weight4bit) and name != "bias":
                weights = module.in_features * module.out_features if name == "weight" else 0
            elif exclude_embeddings and isinstance(module, nn.Embedding):
                weights = 0
            counted[id(p)] = min(weights, counted.get(id(p), weights))  # a head's weight may be an embedding's
    return sum(counted.values())


def _check_loaded(model: Any) -> None:
    """Raise ValueError for a 4-bit layer that has not got all its tensors."""
    for name, module in model.named_modules():
        if isinstance(module, Weight4bit):
            for key, tensor in module.state_dict(keep_vars=True).items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    where = f"the files of {model.name_or_path}"
                    raise ValueError(f"NF4Config: {name}.{key}: expected it in {where}, got none")


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(NF4Quantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(NF4Config)
if importlib.util.find_spec("peft") is not None:
    importlib.import_module("qlora_ext.interop.peft")
