"""Folders of models in bitsandbytes' 4-bit format, read and written bit for bit; bitsandbytes itself is not needed.

Its bytes are ours in another shape. Of the weight P it stores `P.weight` [n/2, 1] (bytes, or the same as floats) with
`P.weight.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map`, and the rest as JSON in
`P.weight.quant_state.bitsandbytes__nf4` or `__fp4`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_ext._ops import NESTED_BLOCKSIZE, ceil_div, codebook
from qlora_ext.dense_linear import is_dense_linear, out_and_in
from qlora_ext.interop.checkpoint_files import (
    CONFIG,
    INDEX,
    PICKLES,
    WEIGHTS,
    StoredTensor,
    is_sizes,
    read_folder,
    read_json,
    short,
    write_shard,
)
from qlora_ext.interop.transformers import NF4Config, NF4Quantizer
from qlora_ext.linear import Linear4bit
from qlora_ext.quantize import weights_to_quantize
from qlora_ext.weight_4bit import Weight4bit
from qlora_ext.whole_files import to_disk, write_files

_STATE = ".quant_state.bitsandbytes__"
_STATE_KEY = re.compile(rf"(.+)\.weight{re.escape(_STATE)}(nf4|fp4)")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CONVERTED = "(converted) "
_STORAGE = (torch.uint8, *_DTYPES.values())
_MAX_STATE = 4096  # bytes of JSON; bitsandbytes writes less than 200


def load_folder(folder: str | os.PathLike[str], *, model_class: Any = None, **from_pretrained_kwargs: Any) -> Any:
    """A model of transformers with this library's layers, from a folder of one in bitsandbytes' 4 bits.

    Everything is checked first; then tensors are read one by one, and none is decoded. Each layer has the dtype that
    its weight had before bitsandbytes quantized it.

    Args:
        folder: what `save_pretrained` writes of a model that was loaded with BitsAndBytesConfig(load_in_4bit=True).
        model_class: of transformers; AutoModelForCausalLM by default.
        from_pretrained_kwargs: dtype, device_map, attn_implementation and the like.

    Raises:
        ValueError: the folder is of another kind, is damaged, or its 4-bit weights are not those of linear layers, all
            with one quant_type and blocksize. The message names the file and the tensor.
    """
    folder = Path(folder)
    try:
        model_type, places, arguments = _checked(folder, model_class or AutoModelForCausalLM, from_pretrained_kwargs)
    except ValueError as error:
        raise ValueError(f"bitsandbytes.load_folder: {error}") from error
    result = model_type.from_pretrained(None, **arguments)
    model = result[0] if isinstance(result, tuple) else result  # a tuple with output_loading_info
    for name, state in places.items():
        model.get_submodule(name.removesuffix(".weight")).dtype = state.dtype
    model.name_or_path = model.config.name_or_path = str(folder)
    return result


def _checked(folder: Path, model_class: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, _State], dict[str, Any]]:
    """The model's class, the 4-bit weights by their names in it, and the arguments of from_pretrained."""
    if "quantization_config" in kwargs:
        raise ValueError(f"quantization_config: expected none beside the folder's own in {CONFIG}, got one")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got {'a file' if folder.exists() else 'none'}")
    if not _is_in_4bit(content := read_json(folder / CONFIG)):
        got = short(_settings(content) or "none")
        raise ValueError(f"{CONFIG}: quantization_config: expected bitsandbytes with load_in_4bit, got {got}")
    tensors = read_folder(folder)
    states = _read_states(tensors)
    dtype: dict[str, Any] = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
    skeleton, kwargs = _skeleton(folder, model_class, kwargs)
    config = skeleton.config
    if config.dtype is None and not dtype:
        dtype = {"dtype": states[0].dtype}
    mapping = kwargs.get("key_mapping")
    places: dict[str, _State] = {}
    rename = _renaming(skeleton, mapping)
    for state in states:
        if (other := places.setdefault(rename(f"{state.name}.weight"), state)) is not state:
            raise ValueError(f"{_at(state.stored)}: expected one state of a layer, got {other.stored.name} as well")
    config.quantization_config = _replace_layers(skeleton, places)
    state_dict = _state_dict(tensors, places, skeleton, _renaming(skeleton, mapping))
    return type(skeleton), places, {"config": config, "state_dict": state_dict, **dtype, **kwargs}


@dataclass(frozen=True)
class _State:
    """What bitsandbytes says of a weight, beside its bytes."""

    name: str  # of the layer, in the folder
    stored: StoredTensor  # its own bytes
    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: float | None  # the mean of absmax, with double quantization only

    @property
    def options(self) -> dict[str, Any]:
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.offset is not None}

    def sizes(self) -> dict[str, tuple[torch.dtype, int]]:
        """Of each tensor that belongs to the weight, by the end of its name: dtype and number of elements."""
        blocks = ceil_div(math.prod(self.shape), self.blocksize)
        if self.offset is None:
            return {"absmax": (torch.float32, blocks), "quant_map": (torch.float32, 16)}
        nested = {"nested_absmax": ceil_div(blocks, NESTED_BLOCKSIZE), "nested_quant_map": 256, "quant_map": 16}
        return {"absmax": (torch.uint8, blocks)} | {key: (torch.float32, size) for key, size in nested.items()}


def _settings(config: dict[str, Any]) -> Any:
    text = config.get("text_config")
    return config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)


def _is_in_4bit(config: dict[str, Any]) -> bool:
    settings = _settings(config)
    if not isinstance(settings, dict) or settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return False
    return settings.get("load_in_4bit", settings.get("_load_in_4bit")) is True


def _skeleton(folder: Path, model_class: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model without values, 4-bit layers or a quantization_config, and what of kwargs is not its config's."""
    try:
        config, kwargs = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, local_files_only=True, **kwargs)
        for each in (config, config.get_text_config()):
            vars(each).pop("quantization_config", None)
        dtype = config.dtype
        make = getattr(model_class, "from_config", None) or model_class._from_config
        with torch.device("meta"):
            skeleton = make(config)
        skeleton.config.dtype = dtype
        if "generation_config" not in kwargs and skeleton.can_generate():
            has_own = (folder / "generation_config.json").is_file()
            how: dict[str, Any] = {} if has_own else {"config_file_name": CONFIG, "_from_model_config": True}
            kwargs["generation_config"] = GenerationConfig.from_pretrained(folder, local_files_only=True, **how)
    except Exception as error:  # of strict dataclasses, of models: they have no other base
        got = " ".join(str(error).split())[:400]
        raise ValueError(f"{CONFIG}: expected a model that transformers can make of it, got: {got}") from error
    return skeleton, kwargs


def _read_states(tensors: Mapping[str, StoredTensor]) -> list[_State]:
    """The states of all 4-bit weights, which must be of one kind."""
    states = []
    for name, stored in tensors.items():
        if ".quant_state." in name:
            if not (match := _STATE_KEY.fullmatch(name)):
                raise ValueError(f"{_at(stored)}: expected the state of a layer's weight in nf4 or fp4, got another's")
            states.append(_read_state(match[1], match[2], stored))
    if not states:
        raise ValueError(f"{_where(tensors)}: expected tensors named *.weight{_STATE}nf4 or fp4, got none")
    for state in states:
        if state.options != states[0].options:
            expected = f"{states[0].options}, as {states[0].name} has"
            raise ValueError(f"{_at(state.stored)}: expected {expected}, got {state.options}")
    return states


def _read_state(name: str, quant_type: str, stored: StoredTensor) -> _State:
    at = _at(stored)
    if stored.dtype != torch.uint8 or len(stored.shape) != 1 or stored.nbytes > _MAX_STATE:
        got = f"{stored.dtype} {short(list(stored.shape))}"
        raise ValueError(f"{at}: expected uint8 [at most {_MAX_STATE}], got {got}")
    try:
        content = json.loads(stored[...].numpy().tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{at}: expected JSON, got: {short(str(error))}") from error
    nested = isinstance(content, dict) and any(key.startswith("nested_") for key in content)
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "quant_type": (repr(quant_type), lambda v: v == quant_type),
        "blocksize": ("a power of two from 32 to 4096", lambda v: type(v) is int and v in (2**i for i in range(5, 13))),
        "dtype": (f"one of {', '.join(_DTYPES)}", lambda v: isinstance(v, str) and v in _DTYPES),
        "shape": ("[out, in]", lambda v: is_sizes(v) and len(v) == 2),
    }
    if nested:
        checks |= {
            "nested_blocksize": (f"{NESTED_BLOCKSIZE}", lambda v: type(v) is int and v == NESTED_BLOCKSIZE),
            "nested_dtype": ("'float32'", lambda v: v == "float32"),
            "nested_offset": ("a finite float32", lambda v: type(v) in (int, float) and abs(v) < 3.4e38),
        }
    if not isinstance(content, dict) or content.keys() != checks.keys():
        raise ValueError(f"{at}: expected an object of {', '.join(checks)}, got {short(content)}")
    for key, (expected, is_right) in checks.items():
        if not is_right(content[key]):
            raise ValueError(f"{at}: {key}: expected {expected}, got {short(content[key])}")
    size_out, size_in = content["shape"]
    offset = float(content["nested_offset"]) if nested else None
    dtype = _DTYPES[content["dtype"]]
    return _State(name, stored, quant_type, content["blocksize"], dtype, (size_out, size_in), offset)


def _renaming(skeleton: Any, key_mapping: Any) -> Callable[[str], str]:
    """From names in files to those in the model, or to none of them where tensors have to be converted."""
    mapping = get_model_conversion_mapping(skeleton, key_mapping)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    prefix = skeleton.base_model_prefix
    meta = skeleton.state_dict()

    def rename(name: str) -> str:
        renamed, converted = rename_source_key(name, renamings, converters, prefix, meta)
        return _CONVERTED + renamed if converted is not None else str(renamed)

    return rename


def _replace_layers(skeleton: Any, places: Mapping[str, _State]) -> dict[str, Any]:
    """Put empty 4-bit layers into the model where the folder has some; return the config by which it does so again."""
    weights = weights_to_quantize(skeleton, skip=())
    for name, state in places.items():
        layer = skeleton.get_submodule(name.removesuffix(".weight")) if name in weights else None
        if layer is None or not is_dense_linear(layer):
            raise ValueError(f"{_at(state.stored)}: expected a linear layer in the model, got none at {name}")
        if state.shape != (expected := out_and_in(layer)):
            got = short(list(state.shape))
            raise ValueError(f"{_at(state.stored)}: shape: expected {list(expected)}, got {got}")
    dense = [name.removesuffix(".weight") for name in weights if name not in places]
    config = NF4Config(**next(iter(places.values())).options, modules_to_not_convert=dense)
    NF4Quantizer(config, pre_quantized=True)._process_model_before_weight_loading(skeleton)
    for name, state in places.items():
        if not isinstance(skeleton.get_submodule(name.removesuffix(".weight")), Linear4bit):  # as its weight is tied
            raise ValueError(f"{_at(state.stored)}: expected a layer to be stored in 4 bits, got {name}")
    return dict(config.to_dict())


def _state_dict(
    tensors: Mapping[str, StoredTensor], places: Mapping[str, _State], skeleton: Any, rename: Callable[[str], str]
) -> dict[str, Any]:
    """What is to be loaded, by its name in the folder, with a 4-bit weight's own tensors in our shapes."""
    expected = skeleton.state_dict()
    dense = dict(tensors)
    content: dict[str, Any] = {}
    for place, state in places.items():
        own = f"{state.name}.weight"
        del dense[state.stored.name]
        stored = {key: _take(dense, f"{own}.{key}", state.stored, *how) for key, how in state.sizes().items()}
        _check_map(stored["quant_map"], state.quant_type)
        packed = _take(dense, own, state.stored, None, ceil_div(math.prod(state.shape), 2))
        content[own] = replace(packed, dtype=torch.uint8, shape=tuple(expected[place].shape))
        shape = tuple(expected[f"{place.removesuffix('weight')}absmax"].shape)
        content[f"{state.name}.absmax"] = replace(stored["absmax"], shape=shape)
        if state.offset is not None:
            _check_map(stored["nested_quant_map"], "dynamic")
            content[f"{state.name}.nested_absmax"] = stored["nested_absmax"]
            content[f"{state.name}.nested_offset"] = torch.tensor(state.offset, dtype=torch.float32)
    layers = {state.name: state for state in places.values()}
    for name, left in dense.items():
        if (state_or_none := layers.get(name.rpartition(".weight.")[0])) is not None:
            wanted = ", ".join(state_or_none.sizes())
            raise ValueError(f"{_at(left)}: expected only {wanted} beside the weight, got this as well")
    _check_dense(dense, expected, rename)
    _check_complete(_where(tensors), {rename(name) for name in [*content, *dense]}, expected, skeleton)
    return content | dense


def _check_dense(
    dense: Mapping[str, StoredTensor], expected: Mapping[str, Tensor], rename: Callable[[str], str]
) -> None:
    """That what is no 4-bit weight's has the shape and the kind of what it is loaded into."""
    for name, stored in dense.items():
        if (own := expected.get(rename(name))) is not None:
            is_float = own.is_floating_point()
            if stored.shape != own.shape or stored.dtype.is_floating_point != is_float:
                wanted = f"{'floats' if is_float else own.dtype} {list(own.shape)}"
                got = f"{stored.dtype} {short(list(stored.shape))}"
                raise ValueError(f"{_at(stored)}: expected {wanted}, got {got}")


def _check_complete(where: str, names: set[str], expected: Mapping[str, Tensor], skeleton: Any) -> None:
    """That nothing is missing, if this is the class that was saved: another may have a new head."""
    is_same = type(skeleton).__name__ in (skeleton.config.architectures or ())
    if not is_same or any(name.startswith(_CONVERTED) for name in names):  # of those it is not known what they become
        return
    tied = skeleton.all_tied_weights_keys
    there = {tied.get(name, name) for name in names}
    may_miss = re.compile("|".join(skeleton._keys_to_ignore_on_load_missing or ()) or "$^")
    for name in expected:
        if tied.get(name, name) not in there and not may_miss.search(name):
            raise ValueError(f"{where}: {name}: expected it in the folder's files, got none")


def _take(
    tensors: dict[str, StoredTensor], name: str, state: StoredTensor, dtype: torch.dtype | None, size: int
) -> StoredTensor:
    """Remove and return one tensor of a 4-bit weight: [size] in this dtype, or for None [size bytes, 1] in any."""
    if (stored := tensors.pop(name, None)) is None:
        raise ValueError(f"{state.path.name}: {name}: expected it beside {state.name}, got none")
    got = f"{stored.dtype} {short(list(stored.shape))}"
    if dtype is not None and (stored.dtype, stored.shape) != (dtype, (size,)):
        raise ValueError(f"{_at(stored)}: expected {dtype} [{size}], got {got}")
    if dtype is None and (
        stored.dtype not in _STORAGE or stored.nbytes != size or stored.shape != (size // stored.dtype.itemsize, 1)
    ):
        raise ValueError(f"{_at(stored)}: expected {size} bytes as uint8 or floats [n, 1], got {got}")
    return stored


def _check_map(stored: StoredTensor, name: str) -> None:
    """bitsandbytes stores the values of the codes, and does not read them."""
    if not ((stored[...] - torch.tensor(codebook(name))).abs() <= 1e-6).all():
        raise ValueError(f"{_at(stored)}: expected the values of {name}, got others")


def _where(tensors: Mapping[str, StoredTensor]) -> str:
    """The file that says what there is."""
    return WEIGHTS if {stored.path.name for stored in tensors.values()} <= {WEIGHTS} else INDEX


def _at(stored: StoredTensor) -> str:
    return f"{stored.path.name}: {stored.name}"


def save_folder(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    quant_storage: torch.dtype = torch.uint8,
) -> None:
    """Write a model with this library's layers as a folder that `from_pretrained` loads with bitsandbytes.

    Files are whole or not there: a new folder appears when all of it is on the disk; in one that holds such a model
    each file is replaced at once.

    Args:
        model: of transformers, loaded with NF4Config or passed through quantize_model; without adapters.
        folder: a new or empty one, or one that holds a model in bitsandbytes' 4 bits.
        max_shard_size: as for `save_pretrained`.
        quant_storage: the dtype as which the bytes of weights are stored: uint8, or for FSDP a floating one.

    Raises:
        TypeError: the model is none of transformers'.
        ValueError: bitsandbytes cannot hold it (fused experts in 4 bits, adapters), or the folder has something else.
    """
    folder = Path(folder)
    layers = _layers_to_save(model, quant_storage)
    _check_may_be_written(folder)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = _settings_to_save(model, layers, quant_storage)
    state = _state_to_save(model, layers, quant_storage)
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    writers: dict[str, Callable[[Path], object]] = {
        file: partial(write_shard, tensors={name: state[name] for name in names})
        for file, names in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        index = json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2)
        writers[INDEX] = lambda path: path.write_text(index + "\n")
    if model.can_generate():
        writers["generation_config.json"] = model.generation_config.to_json_file
    writers[CONFIG] = config.to_json_file
    _write(folder, writers)


def _layers_to_save(model: Any, quant_storage: torch.dtype) -> dict[str, Linear4bit]:
    """The 4-bit layers by name, if bitsandbytes can hold all of them."""
    op = "bitsandbytes.save_folder"
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{op}: model: expected one of transformers', got {type(model).__name__}")
    if quant_storage not in _STORAGE:
        raise ValueError(f"{op}: quant_storage: expected one of {list(_STORAGE)}, got {quant_storage}")
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Weight4bit)}
    if not layers:
        raise ValueError(f"{op}: model: expected layers in 4 bits, got none")
    for name, layer in layers.items():
        if not isinstance(layer, Linear4bit):
            raise ValueError(f"{op}: {name}: expected linear layers, got fused experts, which bitsandbytes cannot load")
        if name.endswith("base_layer"):
            raise ValueError(f"{op}: {name}: expected a model without adapters, got one around this layer")
        if layer.weight.is_meta:
            raise ValueError(f"{op}: {name}: expected values in memory, got a tensor on meta")
        if layer.weight.numel() % quant_storage.itemsize:
            got = f"{layer.weight.numel()} bytes"
            raise ValueError(f"{op}: {name}: expected whole elements of {quant_storage}, got {got}")
    return layers  # type: ignore[return-value]  # each was checked


def _settings_to_save(model: Any, layers: Mapping[str, Linear4bit], quant_storage: torch.dtype) -> dict[str, Any]:
    """A BitsAndBytesConfig by which transformers puts bitsandbytes' layers in these places, and in no others."""
    first = next(iter(layers.values()))
    dense = [name for name, module in model.named_modules(remove_duplicate=False) if is_dense_linear(module)]
    skip = [*dense, *(model._keep_in_fp32_modules or ())]
    for name in layers:
        if not should_convert_module(name, skip):
            expected = "a name that the rules of llm_int8_skip_modules tell from those of dense layers"
            raise ValueError(f"bitsandbytes.save_folder: {name}: expected {expected}, got {dense}")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.quant_type,
        "bnb_4bit_use_double_quant": first.double_quant,
        "bnb_4bit_compute_dtype": _name(model.dtype),
        "bnb_4bit_quant_storage": _name(quant_storage),
        "llm_int8_skip_modules": dense,
    }


def _state_to_save(model: Any, layers: Mapping[str, Linear4bit], quant_storage: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors under the names and in the shapes of files; the large ones are the model's own."""
    state: dict[str, Tensor] = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    for name, layer in layers.items():
        own = {key: state.pop(f"{name}.{key}", None) for key in ("weight", "absmax", "nested_absmax", "nested_offset")}
        about: dict[str, Any] = {
            "quant_type": layer.quant_type,
            "blocksize": layer.blocksize,
            "dtype": _name(layer.dtype),
            "shape": [layer.out_features, layer.in_features],
        }
        at = f"{name}.weight"
        state[at] = layer.weight.detach().reshape(-1).view(quant_storage).view(-1, 1)
        state[f"{at}.absmax"] = layer.absmax.detach().reshape(-1)
        state[f"{at}.quant_map"] = torch.tensor(codebook(layer.quant_type)) + 0.0  # FP4 has a -0.0; theirs is 0.0
        if own["nested_absmax"] is not None and own["nested_offset"] is not None:
            offset = own["nested_offset"].item()
            about |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
            state[f"{at}.nested_absmax"] = own["nested_absmax"]
            state[f"{at}.nested_quant_map"] = torch.tensor(codebook("dynamic"))
        text = json.dumps(about).encode()
        state[f"{at}{_STATE}{layer.quant_type}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if meta := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"bitsandbytes.save_folder: {meta[0]}: expected values in memory, got a tensor on meta")
    state = remove_tied_weights_from_state_dict(state, model)
    return dict(revert_weight_conversion(model, state))


def _check_may_be_written(folder: Path) -> None:
    op = "bitsandbytes.save_folder"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{op}: {folder}: expected a folder, got a file")
    there = [path.name for path in folder.iterdir()] if folder.exists() else []
    weights = [name for name in there if name == CONFIG or name.endswith((".safetensors", *PICKLES))]
    if weights and not (CONFIG in there and _is_in_4bit(read_json(folder / CONFIG))):
        raise ValueError(f"{op}: {folder}: expected no other model in it, got {sorted(weights)[0]}")


def _write(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    if folder.exists():
        write_files({folder / name: write for name, write in writers.items()})
        for path in [folder / WEIGHTS, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
            if path.name not in writers:  # of the model that was there
                path.unlink(missing_ok=True)
        return
    beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    beside.mkdir(parents=True)
    try:
        write_files({beside / name: write for name, write in writers.items()})
        to_disk(beside)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
