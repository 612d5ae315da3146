"""The safetensors file of save_states: its form, headers that others may write, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_ext.optim.safetensors_file import read_header, write_safetensors
from qlora_ext.optim.states import Form

FORM = Form(torch.float32, (2,))


def write(path: Path) -> None:
    write_safetensors(path, {"a": FORM}, {}, lambda file, offsets: os.pwrite(file, b"12345678", offsets["a"]))


def read(path: Path, header: Any, size: int) -> tuple[Any, ...]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with path.open("rb") as file:
        metadata, forms, offsets = read_header("here", file)
    return metadata, forms, {name: offset - 8 - len(text) for name, offset in offsets.items()}


def tensor(*offsets: int, shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def test_tensors_are_aligned_for_those_who_map_the_file(tmp_path: Path) -> None:
    write(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert (int.from_bytes(content[:8], "little") % 8, content[-8:]) == (0, b"12345678")


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EWOULDBLOCK])
def test_where_there_are_no_locks_a_file_is_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no lock")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "file.tmp").touch()  # left by a killed process, or by one at work
    if number == errno.EWOULDBLOCK:
        with pytest.raises(BlockingIOError, match="another process or thread is writing it"):
            write(tmp_path / "file")
    else:
        write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file.tmp" if number == errno.EWOULDBLOCK else "file"]


def test_tensors_may_be_named_in_any_order(tmp_path: Path) -> None:
    got = read(tmp_path / "file", {"b": tensor(8, 16), "a": tensor(0, 8)}, 16)
    assert got == ({}, {"a": FORM, "b": FORM}, {"a": 0, "b": 8})


BAD_HEADERS: dict[str, tuple[Any, int]] = {
    "a number": (7, 0),
    "nested": (b"[" * 100_000, 0),
    "infinite": ({"a": tensor(0, 8, shape=[float("inf")])}, 8),
    "gap": ({"a": tensor(4, 12)}, 12),
    "negative": ({"a": tensor(0, 8), "b": tensor(8, 4, shape=[-1])}, 4),
    "half a row": ({"a": tensor(0, 10, shape=[2.5])}, 10),
    "a size in words": ({"a": tensor(0, 8, shape=["2"])}, 8),
    "a shape of names": ({"a": tensor(0, 4, shape={})}, 4),
    "true": ({"a": tensor(0, 4, shape=[True])}, 4),
    "metadata of numbers": ({"a": tensor(0, 8), "__metadata__": {"a": 1}}, 8),
    "UTF-16": (json.dumps({"a": tensor(0, 8)}).encode("utf-16"), 8),
}


@pytest.mark.parametrize(("header", "size"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_is_refused(header: Any, size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="here: expected a header of float32 and uint8 tensors"):
        read(tmp_path / "file", header, size)


@pytest.mark.parametrize(("length", "size"), [(0, 7), (93, 100), (100_000_001, 1 << 30)])
def test_a_header_longer_than_the_file_or_the_format_allows_is_not_read(length: int, size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little"))
    os.truncate(tmp_path / "file", size)
    with (tmp_path / "file").open("rb") as file, pytest.raises(ValueError, match="here: expected a whole safetensors"):
        read_header("here", file)
