"""A GPU whose launches are recorded by csrc/cuda's launchers, and run in the PTX interpreter."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import library
import numpy as np
import torch
from ptx import DeviceArray, Gpu, PTXError, Result, launch
from ptx.decode import decode
from ptx.scheduler import Scheduler
from ptx.wave import Launch, Options, Wave
from torch import Tensor

STREAM = 0x5EED  # passed to every launcher, expected at every launch


class Limits(NamedTuple):
    """struct DeviceLimits."""

    num_sms: int = 4
    shared_bytes_per_sm: int = 164 * 1024


class LaunchError(Exception):
    """A launcher returned a cudaError_t, or used another stream."""


class Kernel(NamedTuple):
    name: str
    grid: list[int]
    cta: list[int]
    arguments: list[bytes]
    shared_bytes: int


class Memset(NamedTuple):
    address: int
    value: int
    size: int


class RecordedGpu:
    """A GPU for one call. results: of each kernel that the launcher launched, in their order.

    limits: what the launcher is told of the GPU. offsets: the bytes off a 256-byte boundary at which the array of that
    name starts. workspace: what fills it; None: nothing, and reads of what nobody wrote are noted. options: see
    ptx.wave.Options.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        offsets: Mapping[str, int] | None = None,
        workspace: int | None = None,
        csrc: Path = library.CSRC,
        **options: Any,
    ) -> None:
        self.limits, self.offsets, self.workspace, self.options = limits or Limits(), offsets or {}, workspace, options
        self.gpu, self.library = Gpu(), library.load(csrc)
        self.results: list[Result] = []
        # Of tensors too large to hold only the end is there: the bytes before it, by name, and which part of a grid
        # does not run.
        self._missing: dict[str, int] = {}
        self._skipped = Fraction(0)

    def _put(self, name: str, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        array = self.gpu.array(bytes_of(tensor).numpy(), name, readonly=True, offset=self.offsets.get(name, 0))
        return array.address - self._missing.get(name, 0)

    def _empty(self, name: str, shape: int | tuple[int, ...], dtype: torch.dtype) -> Output:
        shape = (shape,) if isinstance(shape, int) else shape
        size = math.prod(shape) * dtype.itemsize
        array = self.gpu.empty(size, "u1", name, self.offsets.get(name, 0))
        return Output(array, array.address - self._missing.get(name, 0), shape, dtype)

    def _filled(self, name: str, tensor: Tensor) -> Output:
        """An array that is read and written."""
        output = self._empty(name, tuple(tensor.shape), tensor.dtype)
        self.gpu.write(output.address, bytes_of(tensor).numpy().tobytes())
        return output

    def _workspace(self, size: int) -> int:
        array = self.gpu.empty(size, "u1", "workspace", self.offsets.get("workspace", 0))
        if self.workspace is not None:
            self.gpu.write(array.address, bytes([self.workspace]) * size)
        return array.address

    # --- what they launch ---------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: int | ctypes.Array[ctypes.c_int64]) -> None:
        """Calls a function of shim.cpp, then runs what it launched."""
        for command in self._record(name, *arguments):
            self._run(command)

    def _record(self, name: str, *arguments: int | ctypes.Array[ctypes.c_int64]) -> list[Kernel | Memset]:
        """What a function of shim.cpp launched. Its last argument is the stream."""
        recorded: list[Kernel | Memset] = []
        streams = set()

        def record_launch(kernel: bytes, grid: Any, cta: Any, shared_bytes: int, stream: int, values: Any) -> None:
            parameters = self.library.kernel(kernel.decode()).parameters
            data = [ctypes.string_at(values[i], parameter.size) for i, parameter in enumerate(parameters)]
            recorded.append(Kernel(kernel.decode(), list(grid[0]), list(cta[0]), data, shared_bytes))
            streams.add(stream)

        def record_memset(address: int, value: int, size: int, stream: int) -> None:
            recorded.append(Memset(address, value, size))
            streams.add(stream)

        functions = self.library.functions
        callbacks = library.LAUNCH(record_launch), library.MEMSET(record_memset)  # kept until the launcher returns
        functions.qlora_set_recorder(*callbacks)
        integers = [ctypes.c_int64(value) if isinstance(value, int) else value for value in (*arguments, STREAM)]
        if error := functions[name](*integers):
            raise LaunchError(f"{name}: CUDA error {error}")
        if foreign := streams - {STREAM}:
            raise LaunchError(f"{name} got stream {STREAM:#x} and used {foreign}")
        return recorded

    def _run(self, command: Kernel | Memset) -> None:
        if isinstance(command, Memset):
            end = command.address + command.size
            if not any(one.start <= command.address and end <= one.end for one in self.gpu.allocations):
                raise PTXError(f"memset of {command.size} bytes at {self.gpu.describe(command.address)}")
            self.gpu.write(command.address, bytes([command.value & 0xFF]) * command.size)
        elif not self._skipped:
            text = self.library.ptx[command.name]
            self.results.append(launch(text, *command, dev=self.gpu, **self.options))
        else:
            self._run_end(command)

    def _run_end(self, command: Kernel) -> None:
        """The CTAs behind the skipped ones."""
        kernel = self.library.kernel(command.name)
        decode(kernel)
        self.gpu.load_variables(kernel.module)
        parameters = bytearray(kernel.parameter_bytes)
        for parameter, data in zip(kernel.parameters, command.arguments, strict=True):
            parameters[parameter.offset : parameter.offset + parameter.size] = data
        grid, cta = tuple(command.grid), tuple(command.cta)
        launched = Launch(kernel, self.gpu, bytes(parameters), grid, cta, command.shared_bytes, Options(**self.options))
        Scheduler(Wave(launched, np.arange(int(math.prod(grid) * self._skipped), math.prod(grid)))).run()
        if errors := [str(finding) for finding in launched.findings.values() if finding.is_error]:
            raise PTXError("\n".join(errors))


class Output(NamedTuple):
    array: DeviceArray
    address: int  # for the launcher
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Raises if not all of it was written."""
        unwritten = int((~self.array.written_elements()).sum())
        if unwritten:
            name = next(one.name for one in self.array.gpu.allocations if one.start == self.array.address)
            raise PTXError(f"{unwritten} of {self.array.size} bytes of {name} were never written")
        if not self.array.size:  # numpy's strides of nothing are none that torch can view
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.from_numpy(self.array.get()).view(self.dtype).view(self.shape)


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
