"""A folder of safetensors with its JSON files, checked before a tensor is loaded: each error names file and key."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_INT64 = 1 << 63


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Indexing reads it, into memory of its own: so transformers takes it for one of its own."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, _: object) -> Tensor:
        data = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        if len(data) != self.nbytes:
            raise ValueError(f"{self.path.name}: {self.name}: expected {self.nbytes} bytes, got {len(data)}")
        return torch.from_numpy(data).view(self.dtype).view(self.shape)

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]

    def get_shape(self) -> list[int]:
        return list(self.shape)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of model.safetensors, or of the shards that its index lists, by name; none is read yet.

    Raises: ValueError that names the file, and the key if it is about one.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
            got = f"only {pickles[0]}, a pickle, which is not read" if pickles else "none"
            raise ValueError(f"{folder}: expected {WEIGHTS} or {INDEX}, got {got}")
        return read_header(folder / WEIGHTS)
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{INDEX}: weight_map: expected the name of a file for each tensor, got {short(places)}")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        if file != os.path.basename(file) or not file.endswith(".safetensors") or "\0" in file:
            raise ValueError(f"{INDEX}: weight_map: expected safetensors files beside it, got {short(file)}")
        found = read_header(folder / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(
                f"{file}: {twice[0]}: expected it in one file, got it in {tensors[twice[0]].path.name} too"
            )
        tensors |= found
    for name, file in places.items():
        if name not in tensors or tensors[name].path.name != file:
            raise ValueError(f"{file}: {short(name)}: expected it there, as {INDEX} says, got none")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if there is none."""
    data = _regular(path).read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: expected JSON, got: {short(str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected a JSON object, got {short(content)}")
    return content


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, which must fill it without holes; ValueError if it is damaged."""
    with open(_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            at_most = max(0, min(size - 8, _MAX_HEADER))
            raise ValueError(f"{path.name}: expected a header of at most {at_most} bytes, got {length}")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: expected a header in JSON, got: {short(str(error))}") from error
    if not isinstance(header, dict) or not isinstance(header.pop("__metadata__", {}), dict):
        raise ValueError(f"{path.name}: expected a header of tensors, got {short(header)}")
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise ValueError(f"{path.name}: {name}: expected offset {end - start}, got {tensor.offset - start}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{path.name}: expected {end} bytes, by its header, got {size}")
    return tensors


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file: at no time is there a copy of more than one tensor."""
    # As safetensors does it: wide types first, so that each tensor is aligned.
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in order:
        offsets = [end, end := end + tensor.numel() * tensor.dtype.itemsize]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _tensor(path: Path, name: str, entry: object, start: int, size: int) -> StoredTensor:
    """What the header says of a tensor, if that can be."""
    at = f"{path.name}: {name if name.isprintable() else ascii(name)}"
    keys = ("dtype", "shape", "data_offsets")
    if not name.isprintable() or not isinstance(entry, dict) or sorted(entry) != sorted(keys):
        raise ValueError(f"{at}: expected a printable name, and {', '.join(keys)}, got {short(entry)}")
    code, shape, offsets = (entry[key] for key in keys)
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"{at}: dtype: expected one that torch has, got {short(code)}")
    if not is_sizes(shape):
        raise ValueError(f"{at}: shape: expected a list of sizes, got {short(shape)}")
    if not is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise ValueError(f"{at}: data_offsets: expected two within {size - start} bytes, got {short(offsets)}")
    tensor = StoredTensor(path, name, _DTYPES[code], tuple(shape), start + offsets[0])
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"{at}: expected {short(tensor.nbytes)} bytes, by dtype and shape, got {short(offsets)}")
    return tensor


def is_sizes(value: object) -> bool:
    """Whether it is a list of sizes that torch could take."""
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(size) is int and 0 <= size < _INT64 for size in value)
    )


def _regular(path: Path) -> Path:
    if not path.is_file():  # opening a FIFO would wait for its writer
        raise ValueError(f"{path.name}: expected a regular file, got {'another kind' if path.exists() else 'none'}")
    return path


def short(value: object) -> str:
    """As it is printed, but at most a line of it."""
    try:
        text = ascii(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
