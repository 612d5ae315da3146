"""The bytes that a paged step moves, moved by themselves and as plainly as can be: to and from a file, or a GPU."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

MOUNTS = Path("/proc/self/mounts")


class RawFile:
    """A file with reserved space, which one thread reads and writes by pages."""

    def __init__(self, path: Path, page_bytes: int, pages: int) -> None:
        self._page = mmap.mmap(-1, page_bytes)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._file, 0, pages * page_bytes)

    def __del__(self) -> None:
        os.close(self._file)

    def move(self, pages: int) -> None:
        """Read so many pages, and write each back."""
        size = len(self._page)
        for at in range(0, pages * size, size):
            moved = os.preadv(self._file, [self._page], at), os.pwrite(self._file, self._page, at)
            assert moved == (size, size), f"expected {size} bytes read and written, got {moved}"


class RawLink:
    """Pages between pinned host memory and a GPU, in both directions at the same time."""

    def __init__(self, page_bytes: int, device: torch.device) -> None:
        self._host = [torch.zeros(page_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._device = [torch.zeros(page_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]

    def move(self, pages: int) -> None:
        """So many pages each way."""
        for _ in range(pages):
            with torch.cuda.stream(self._streams[0]):
                self._device[0].copy_(self._host[0], non_blocking=True)
            with torch.cuda.stream(self._streams[1]):
                self._host[1].copy_(self._device[1], non_blocking=True)
        for stream in self._streams:
            stream.synchronize()


def filesystem(folder: Path) -> str:
    """The type of what the folder is on: ext4, tmpfs, ..."""
    lines = [line.split() for line in MOUNTS.read_text().splitlines()] if MOUNTS.exists() else []
    kinds = {point: kind for _, point, kind, *_ in lines if folder.resolve().is_relative_to(point)}
    return kinds[max(kinds, key=len)] if kinds else "unknown"
