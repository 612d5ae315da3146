"""A safetensors file written and read piece by piece, so that its tensors need never be in memory at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qlora_ext.optim.states import Form
from qlora_ext.whole_files import is_at, lock, naming

_NAMES = {torch.float32: "F32", torch.uint8: "U8"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


def write_safetensors(
    path: Path, forms: Mapping[str, Form], metadata: Mapping[str, str], fill: Callable[[int, dict[str, int]], None]
) -> None:
    """Write a safetensors file: `fill(descriptor, offsets)` writes each tensor at its offset.

    The file is written beside as <name>.tmp, in space that is reserved first, and renamed when it is whole and on the
    disk: whatever happens before leaves the old file as it was.

    Raises:
        BlockingIOError: another process or thread is writing that file.
        OSError: it cannot be written, or the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, form in forms.items():
        offsets = [end, end := end + form.nbytes]
        header[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with _replacing(path) as file:
        os.posix_fallocate(file.fileno(), 0, start + end)
        file.write(len(text).to_bytes(8, "little") + text)
        fill(file.fileno(), {name: start + header[name]["data_offsets"][0] for name in forms})


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[FileIO]:
    """A new file, locked, which is <name>.tmp until the block ends and then `path`; gone if the block raises."""
    beside = path.with_name(f"{path.name}.tmp")
    with naming(path), _new_file(beside) as file:
        try:
            yield file
            os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def _new_file(path: Path) -> FileIO:
    while True:
        try:
            file = open(path, "xb", buffering=0)  # noqa: SIM115
        except FileExistsError:
            _remove_left(path)
            continue
        # Until the lock holds, another may take the file for a left one.
        if lock(file) and is_at(path, file):
            return file
        file.close()


def _remove_left(path: Path) -> None:
    """Remove what a killed process has left; of a link, not what that leads to."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        if not lock(file):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process or thread is writing it", str(path))
        if is_at(path, file):
            path.unlink()


def read_header(at: str, file: BinaryIO) -> tuple[dict[str, str], dict[str, Form], dict[str, int]]:
    """Of a safetensors file: its metadata, and of each tensor the form and the offset in the file.

    Raises:
        ValueError: it is no safetensors file, is not whole, or holds other dtypes than float32 and uint8.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"{at}: expected a whole safetensors file, got {size} bytes")
    text = file.read(length)
    forms, offsets, start = {}, {}, 8 + length
    end = 0
    try:
        header = json.loads(text.decode())
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"metadata {metadata}")
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape = tensor["shape"]
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"{name} of shape {shape}")
            forms[name] = Form(_DTYPES[tensor["dtype"]], tuple(shape))
            offsets[name] = start + end
            expected = [end, end := end + forms[name].nbytes]
            if tensor["data_offsets"] != expected:
                raise ValueError(f"{name} at {tensor['data_offsets']} instead of {expected}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{at}: expected a header of float32 and uint8 tensors, got {error!r}") from error
    if start + end != size:
        raise ValueError(f"{at}: expected {start + end} bytes, got {size}")
    return metadata, forms, offsets
