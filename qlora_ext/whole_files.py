"""Files that are whole or not there: written beside their places, then renamed; by one process at a time, if locked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError


def write_files(writers: dict[Path, Callable[[Path], object]]) -> None:
    """Let each write to a path beside its own, then rename all: no error at writing leaves half a file or set."""
    # Several processes, perhaps of several machines, may write to one folder.
    beside = {path: path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            with naming(path):
                write(beside[path])
                to_disk(beside[path])
        for path in filter(Path.is_dir, writers):  # before the first has replaced another
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for path in writers:
            os.replace(beside[path], path)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or all of a folder, is on the disk: renamed before, it may be empty after a power cut."""
    for part in (path, *path.rglob("*")):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make errors of writing OSErrors that name this path: of a full disk none does, and safetensors has its own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: not written: {error}") from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def lock(file: FileIO) -> bool:
    """Whether it is locked now, until it is closed; where there are no locks, it counts as locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)
    return True


def is_at(path: Path, file: FileIO) -> bool:
    """Whether this open file is the one that has this path now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    return False
