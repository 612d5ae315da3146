"""A Hugging Face folder of safetensors, read one tensor at a time."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

DECODED = ("mxfp4", "fp8")  # formats in which models are published, and which are decoded as they are read


class StoredTensor(NamedTuple):
    """A tensor not read yet: `read(dtype)` returns it, for None in its own dtype (gguf: float32)."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[torch.dtype | None], Tensor]


class ModelFolder:
    """Reads config.json, model.safetensors or its shards, and the tokenizer; pickled weights are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise ValueError(f"{path}: expected a model folder with config.json, got none")
        self.files = self._weight_files()

    def config(self) -> PreTrainedConfig:
        """Read config.json, but for the format of the tensors.

        Raises: ValueError if it is damaged, or that of a model whose layers are of another kind than its own.
        """
        config: PreTrainedConfig = self._read(AutoConfig, "config")
        method = _pop_format(config).get("quant_method")
        if method not in (None, *DECODED):
            raise ValueError(f"{self.path}: expected the original model, got one quantized by {method}")
        return config

    def decoder(self) -> HfQuantizer | None:
        """What knows how transformers decodes the format of the tensors, if they are in MXFP4 or FP8."""
        settings = _pop_format(self._read(AutoConfig, "config"))
        if not settings.get("quant_method"):
            return None
        try:
            decoder: HfQuantizer = AutoHfQuantizer.from_config({**settings, "dequantize": True}, pre_quantized=True)
        except Exception as error:  # of dataclasses and of each format's own checks
            raise ValueError(
                f"{self.path}: expected a quantization_config that transformers can read ({error})"
            ) from error
        return decoder

    def tensors(self, model: PreTrainedModel) -> Iterator[StoredTensor]:
        """Yield every tensor of every file, under the name it has there."""
        for path in self.files:
            try:
                file: Any = safe_open(path, framework="pt")
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a readable safetensors file, or a truncated one ({error})") from error
            for name, shape in shapes.items():
                yield StoredTensor(name, shape, partial(_read_tensor, file, f"{path}: tensor {name!r}", name))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the folder; ValueError if there is none, or a damaged one."""
        tokenizer: PreTrainedTokenizerBase = self._read(AutoTokenizer, "tokenizer")
        return tokenizer

    def generation_config(self) -> GenerationConfig | None:
        """How the model generates by default, if the folder says so; ValueError if that is damaged."""
        there = (self.path / "generation_config.json").is_file()
        return self._read(GenerationConfig, "generation_config") if there else None

    def _read(self, kind: Any, what: str) -> Any:
        try:
            return kind.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # of JSON, of tokenizers, of strict dataclasses: they have no other base
            raise ValueError(f"{self.path}: expected a {what} that transformers can read, got: {error}") from error

    def _weight_files(self) -> list[Path]:
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise ValueError(f"{self.path}: expected model.safetensors (pickled checkpoints are not read), got none")
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [self.path / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index}: expected a safetensors index with a weight_map ({error})") from error
        for name, file in zip(names, files, strict=True):
            if file.parent != self.path or not file.is_file():
                raise ValueError(f"{index}: expected the file {name!r} beside it, got none")
        return files


def _pop_format(config: PreTrainedConfig) -> dict[str, Any]:
    """Take the format of the tensors from a config, which is that of a model of plain ones then."""
    popped = [vars(each).pop("quantization_config", None) for each in (config, config.get_text_config())]
    return next((settings for settings in popped if settings), {})


def _read_tensor(file: Any, at: str, name: str, dtype: torch.dtype | None) -> Tensor:
    # The tensor is a view of the mapped file: with a copy, later changes of the file do not reach the model.
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, NotImplementedError) as error:  # numbers of a kind that torch does not have
        raise ValueError(f"{at}: expected a tensor that safetensors can read, got: {error}") from error
    if dtype is None:
        return tensor
    if tensor.is_floating_point() != dtype.is_floating_point:
        raise ValueError(f"{at}: expected a {dtype}, got {tensor.dtype}")
    return tensor.to(dtype=dtype, copy=True)
