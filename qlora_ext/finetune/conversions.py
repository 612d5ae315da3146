"""A checkpoint's tensors as the model names and arranges them, made one at a time.

Files hold the experts of a mixture one by one, where the model has them fused; tensors of other architectures are
renamed, joined or split. transformers does so while it reads a whole model; here each is made when it is asked for.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from .gguf_file import GgufFile
from .model_folder import ModelFolder, StoredTensor


def take_decoder(config: PreTrainedConfig) -> HfQuantizer | None:
    """Take from `config` how the tensors are stored, if in MXFP4 or FP8: the model will have plain ones."""
    stored = config.__dict__.pop("quantization_config", None)
    if stored is None:
        return None
    decoder: HfQuantizer = AutoHfQuantizer.from_config({**stored, "dequantize": True}, pre_quantized=True)
    return decoder


def converted(
    checkpoint: ModelFolder | GgufFile, model: PreTrainedModel, decoder: HfQuantizer | None
) -> Iterator[StoredTensor]:
    """Return the tensors of `checkpoint` as `model` has them now; those that no conversion is for, as they are.

    `model.save_pretrained` undoes afterwards what was done, but for the decoding, as it does after `from_pretrained`.

    Args:
        decoder: from `take_decoder`.

    Raises: ValueError, where a tensor is reached that cannot be made of what is stored.
    """
    transforms = get_model_conversion_mapping(model, hf_quantizer=decoder, add_legacy=False)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    found: dict[str, StoredTensor | WeightConverter] = {}
    names = model.state_dict()
    for tensor in sorted(checkpoint.tensors(model), key=lambda tensor: dot_natural_key(tensor.name)):
        name, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, names)
        if name not in names and tensor.name in names:  # a file of the model's own names
            name, pattern = tensor.name, None
        if pattern is None or name not in names:
            found[name] = tensor._replace(name=name)
            continue
        if name not in found:
            found[name] = deepcopy(by_pattern[pattern])
        converter: Any = found[name]
        converter.add_tensor(name, tensor.name, pattern, partial(tensor.read, None))
    if decoder is None:
        vars(model)["_weight_conversions"] = [transform for transform in transforms if transform.was_used()]
    # Converters ask for the dtype of what they make, when the model's layers may be others.
    return _made(found, deepcopy(model), checkpoint.path)


def _made(
    found: dict[str, StoredTensor | WeightConverter], model: PreTrainedModel, path: Path
) -> Iterator[StoredTensor]:
    for name, tensor in found.items():
        if isinstance(tensor, StoredTensor):
            yield tensor
            continue
        parts = sorted(tensor.layer_targets[name])
        try:
            made = tensor.convert(name, model=model, config=model.config)
        except Exception as error:  # whatever transformers' operations make of tensors that do not fit together
            made_of = f"{parts[0]!r} and {len(parts) - 1} more"
            raise ValueError(f"{path}: tensor {name!r}: cannot be made of {made_of} ({error})") from error
        results = {target: value[0] if isinstance(value, list) else value for target, value in made.items()}
        del made
        for target in list(results):
            yield StoredTensor(target, tuple(results[target].shape), partial(_take, results, target))


def _take(results: dict[str, Tensor], name: str, dtype: torch.dtype | None) -> Tensor:
    """Once: whoever still holds the reader holds no tensor then, while the next one is made."""
    tensor = results.pop(name)
    return tensor if dtype is None else tensor.to(dtype=dtype, copy=True)  # a part of a file's tensor may be a view
