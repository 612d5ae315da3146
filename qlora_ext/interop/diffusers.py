"""NF4Config for diffusers: `UNet2DConditionModel.from_pretrained(folder, quantization_config=NF4Config())`.

Importing this module registers the method "qlora_ext" with diffusers, also for folders that were saved in 4 bits, and
teaches PEFT the 4-bit layer. `quantize_model(unet)` serves a model that is in memory already.
"""

from __future__ import annotations

import importlib
import importlib.util
from enum import Enum
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from qlora_ext.adapters.merge import merge_adapter
from qlora_ext.interop.nf4_options import METHOD, NF4Options
from qlora_ext.linear import Linear4bit
from qlora_ext.quantize import quantize_model


class _Method(str, Enum):
    """A str for JSON and look-ups, and an Enum, as diffusers reads its `.value`."""

    NAME = METHOD


class NF4Config(NF4Options, QuantizationConfigMixin):  # type: ignore[misc]
    __doc__ = NF4Options.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quant_method = _Method.NAME

    def __repr__(self) -> str:
        return f"NF4Config({self.options}, modules_to_not_convert={self.modules_to_not_convert})"


class NF4Quantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Gives the empty model its 4-bit layers; each then takes a float weight and quantizes it, or tensors in 4 bits,
    whichever the files have."""

    quantization_config: NF4Config
    use_keep_in_fp32_modules = True  # quantize_model leaves those layers
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # else the loader refuses a float weight: its shape is not that of the codes

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("NF4Config: device_map: expected devices and cpu, got disk")

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        quantize_model(model, skip=self.quantization_config.skip, **self.quantization_config.options)
        model.register_to_config(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Without the scales of 4-bit layers, which float files lack, and which are made here."""
        return [key for key in missing_keys if key.endswith(".weight") or not _is_stored(model, key)]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *_: Any, **__: Any
    ) -> bool:
        return _is_stored(model, param_name)

    def check_quantized_param_shape(self, *_: Any) -> bool:
        return True  # the layer looks at the shape of a float weight, accelerate at that of a stored tensor

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        *_: Any,
        dtype: torch.dtype | None = None,
        **__: Any,
    ) -> None:
        """Set one tensor of a 4-bit layer; diffusers has cast param_value, scales too, so it is read anew."""
        value, path = state_dict[param_name], param_name.rpartition(".")[0]
        layer = model.get_submodule(path)
        if isinstance(layer, Linear4bit) and param_name.endswith(".weight") and value.is_floating_point():
            layer.dtype = dtype or layer.dtype
            try:
                layer.quantize_(value.to(target_device, layer.dtype))
            except (TypeError, ValueError) as error:
                raise type(error)(f"NF4Config: {path}: {error}") from error
        else:
            set_module_tensor_to_device(model, param_name, target_device, value=value)

    def _dequantize(self, model: Any) -> Any:
        merge_adapter(model, dequantize=True)
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(kept)  # else save_pretrained would call the folder quantized
        return model


def _is_stored(model: nn.Module, name: str) -> bool:
    """Whether it names one of the tensors that hold the weight of a Linear4bit: all that it has but the bias."""
    path, _, key = name.rpartition(".")
    return key != "bias" and isinstance(model.get_submodule(path), Linear4bit)


def _teach_flux() -> None:
    """FluxPipeline.load_lora_weights compares the shapes of weights, to widen layers for adapters with more inputs."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    own = FluxLoraLoaderMixin._calculate_module_shape

    def shape(model: nn.Module, base_module: Any = None, base_weight_param_name: str | None = None) -> Any:
        module = base_module
        if module is None and base_weight_param_name is not None:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if isinstance(module, Linear4bit):
            return module.out_features, module.in_features
        return own(model, base_module, base_weight_param_name)

    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = NF4Config
AUTO_QUANTIZER_MAPPING[METHOD] = NF4Quantizer
if importlib.util.find_spec("peft") is not None:
    importlib.import_module("qlora_ext.interop.peft")
    _teach_flux()
