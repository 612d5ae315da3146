"""A checkpoint's tensors as the model names and arranges them, made one at a time.

Files hold the experts of a mixture one by one, where the model has them fused; tensors of other architectures are
renamed, joined or split. transformers does so while it reads a whole model; here each is made when it is asked for.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .gguf_file import GgufFile
from .model_folder import ModelFolder, StoredTensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Part(NamedTuple):
    """A stored tensor, and the pattern by which a converter knows it; None: it is the model's as it is."""

    pattern: str | None
    tensor: StoredTensor


def converted(checkpoint: ModelFolder | GgufFile, model: PreTrainedModel) -> Iterator[StoredTensor]:
    """Return the tensors of `checkpoint` as `model` has them now, each to be read once.

    `model.save_pretrained` undoes the conversions afterwards, but for decoding, as it does after `from_pretrained`.

    Raises: ValueError, where a tensor is reached that cannot be made of what is stored.
    """
    decoder = checkpoint.decoder()
    transforms = get_model_conversion_mapping(model, hf_quantizer=decoder, add_legacy=False)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    parts: dict[str, list[Part]] = {}
    names = model.state_dict()
    for tensor in sorted(checkpoint.tensors(model), key=lambda tensor: dot_natural_key(tensor.name)):
        name, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, names)
        if name not in names:  # in a file of the model's own names, or of a part that the model is without
            name, pattern = tensor.name if tensor.name in names else name, None
        group = parts.setdefault(name, [])
        if group and name in names and None in (pattern, group[0].pattern):
            got = f"{group[0].tensor.name!r} and {tensor.name!r}"
            raise ValueError(f"{checkpoint.path}: tensor {name!r}: expected it once, or in parts, got {got}")
        group.append(Part(pattern, tensor))
    if decoder is None:
        vars(model)["_weight_conversions"] = [transform for transform in transforms if transform.was_used()]
    # A copy: converters look up dtypes in the model, whose own layers will be in 4 bits by then.
    make = partial(_make, by_pattern, deepcopy(model), checkpoint.path)
    return (tensor for name, group in parts.items() for tensor in make(name, group))


def _make(
    converters: dict[str, WeightConverter], model: PreTrainedModel, path: Path, name: str, parts: list[Part]
) -> Iterator[StoredTensor]:
    if all(part.pattern is None for part in parts):
        yield from (part.tensor._replace(name=name) for part in parts)
        return
    try:
        made = _convert(converters, model, name, parts)
    except Exception as error:  # whatever transformers' operations make of tensors that do not fit together
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        what = f"{parts[0].tensor.name!r}{more} ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: tensor {name!r}: cannot be made of {what}") from error
    results = {target: value[0] if isinstance(value, list) else value for target, value in made.items()}
    del made
    for target in list(results):
        yield StoredTensor(target, tuple(results[target].shape), partial(_take, results, target))


def _convert(
    converters: dict[str, WeightConverter], model: PreTrainedModel, name: str, parts: list[Part]
) -> dict[str, Any]:
    patterns: dict[str, list[StoredTensor]] = {}
    for pattern, tensor in parts:
        patterns.setdefault(pattern or "", []).append(tensor)
    converter: Any = converters[next(iter(patterns))]
    # Codes without their scales would be taken for values.
    codes = sum(part.tensor.read(None).dtype in FP8 for part in parts)
    scales = sum(len(tensors) for pattern, tensors in patterns.items() if "scale_inv" in pattern)
    if codes > scales:
        raise ValueError(f"expected a scale for each tensor in FP8, got {scales} for {codes}")
    for pattern, tensors in patterns.items():
        numbers = [int(re.findall(r"\.(\d+)(?=\.)", tensor.name)[-1]) for tensor in tensors] if ".*." in pattern else []
        if numbers != list(range(len(numbers))):  # transformers would stack what there is
            raise ValueError(f"expected all of {pattern} from 0 on, got {numbers}")
        for tensor in tensors:
            converter.add_tensor(name, tensor.name, pattern, partial(tensor.read, None))
    made: dict[str, Any] = converter.convert(name, model=model, config=model.config)
    return made


def _take(results: dict[str, Tensor], name: str, dtype: torch.dtype | None) -> Tensor:
    """Hand a result over, once: who keeps the reader keeps no tensor alive while the next one is made."""
    tensor = results.pop(name)
    return tensor if dtype is None else tensor.to(dtype=dtype, copy=True)  # a part of a file's tensor may be a view
