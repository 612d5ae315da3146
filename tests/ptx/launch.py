"""Running a kernel: arguments, device arrays, launches under one or all schedules."""

from __future__ import annotations

import functools
import math
import re
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import instructions as _registers_the_decoders  # noqa: F401
from .decode import decode
from .errors import PTXError, UnsupportedError
from .kernel import Kernel
from .memory import GlobalMemory
from .module import Module
from .report import Result
from .scheduler import Scheduler
from .syntax import Variable, parse_immediate
from .wave import Launch, Options, Wave

MAXIMUM_SHARED = 227 * 1024
SHADOW_BYTES = 1 << 29  # what the race detector may take for one wave
# Each of these alone has hidden some bug that another shows.
ALL_SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    {"schedule": "warp"},
    {"schedule": "warp_rev"},
    {"schedule": "warp", "cp_async": "eager"},
    {"schedule": "warp_rev", "cp_async": "eager", "block_order": "reverse", "atom_reverse": True},
    {"schedule": "warp_rand", "block_order": "random", "seed": 1},
)


@functools.lru_cache(maxsize=64)
def module_of(ptx: str) -> Module:
    return Module(ptx)


@functools.lru_cache(maxsize=64)
def kernels(ptx: str) -> dict[str, str]:
    """{mangled: demangled} of all kernels."""
    names = module_of(ptx).entries()
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, plain.stdout.splitlines(), strict=True))


def find_kernel(ptx: str, name: str) -> Kernel:
    """The kernel of that name, mangled or not, or the only one whose name contains it."""
    names = kernels(ptx)
    exact = [
        mangled
        for mangled, plain in names.items()
        if name in (mangled, re.split(r"[<(]", plain.removeprefix("void "))[0])
    ]
    partly = [mangled for mangled, plain in names.items() if name in mangled or name in plain]
    found = partly if len(exact) != 1 else exact
    if len(found) != 1:
        raise KeyError(f"{name!r} matches {found} of {names}")
    return module_of(ptx).kernel(found[0])


def unsupported(ptx: str, name: str) -> list[str]:
    """The instructions of the kernel that would raise if a thread reached them."""
    kernel = find_kernel(ptx, name)
    decode(kernel)
    return [instruction.problem for instruction in kernel.instructions if instruction.problem]


@dataclass
class DeviceArray:
    """An array in device memory; address is what a kernel gets (and what goes into tables of pointers)."""

    gpu: Gpu
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def get(self) -> np.ndarray:
        return self.gpu.read(self.address, self.size).view(self.dtype).reshape(self.shape)

    def written_elements(self) -> np.ndarray:
        """Which elements were ever written, by the host or by a kernel."""
        each = self.gpu.written(self.address, self.size).reshape(-1, self.dtype.itemsize)
        return each.all(axis=1).reshape(self.shape)


class Gpu(GlobalMemory):
    """Device memory that outlives a launch."""

    def array(self, data: np.ndarray, name: str = "", readonly: bool = False, offset: int = 0) -> DeviceArray:
        """A copy of data. readonly: a store to it is an error; offset: bytes off the 256-byte boundary that it would
        start at.
        """
        data = np.ascontiguousarray(data)
        return self._place(data.shape, data.dtype, name, readonly, data.tobytes(), offset)

    def empty(self, shape: int | tuple[int, ...], dtype: Any, name: str = "", offset: int = 0) -> DeviceArray:
        """Memory that nobody has written: reads of it are reported."""
        return self._place((shape,) if isinstance(shape, int) else shape, np.dtype(dtype), name, False, None, offset)

    def _place(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], name: str, readonly: bool, data: bytes | None, offset: int
    ) -> DeviceArray:
        size = math.prod(shape) * dtype.itemsize
        name = name or f"array{len(self.allocations)}"
        return DeviceArray(self, self.allocate(size, name, readonly, data, offset), shape, dtype)

    def load_variables(self, module: Module) -> None:
        """Gives the module's __device__ and __constant__ variables memory, once."""
        for variable in module.variables:
            if variable.space in ("global", "const") and variable.name not in self.symbols:
                data = _initial_bytes(variable)
                readonly = variable.space == "const"
                self.symbols[variable.name] = self.allocate(len(data), variable.name, readonly, data)


def _initial_bytes(variable: Variable) -> bytes:
    size = variable.element_size
    data = bytearray(variable.size or size)
    for i, text in enumerate(variable.initial):
        if not text[0].isdigit() and text[0] not in "+-.":
            raise UnsupportedError(f"initial value {text} of {variable.name}")
        number = parse_immediate(text)
        bits = number.value
        if number.kind == "f":
            bits = int.from_bytes(struct.pack("<f" if size == 4 else "<d", number.value), "little")
        data[i * size : (i + 1) * size] = (int(bits) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(data)


def _pack(parameter: Variable, value: Any) -> bytes:
    """The bytes of a parameter, by its PTX type."""
    size = parameter.size
    if isinstance(value, DeviceArray):
        value = value.address
    if value is None:
        data = bytes(size)
    elif isinstance(value, (bytes, np.void)) or (isinstance(value, np.generic) and value.dtype.itemsize == size):
        data = value if isinstance(value, bytes) else value.tobytes()
    elif parameter.type in ("f32", "f64"):
        data = struct.pack("<f" if parameter.type == "f32" else "<d", float(value))
    elif isinstance(value, float):
        raise TypeError(f"parameter {parameter.name}: expected {parameter.type}, got the float {value}")
    else:
        data = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if len(data) != size:
        raise TypeError(f"parameter {parameter.name}: expected {size} bytes, got {len(data)}")
    return data


def _three(lengths: int | Sequence[int]) -> tuple[int, ...]:
    lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    return lengths + (1,) * (3 - len(lengths))


def _check_limits(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], dynamic_smem: int) -> None:
    threads, shared = math.prod(block), kernel.dynamic_offset + dynamic_smem
    if not 1 <= threads <= kernel.maximum_block:
        raise PTXError(f"block of {threads} threads, the kernel takes 1 to {kernel.maximum_block}")
    if kernel.required_block and list(block)[: len(kernel.required_block)] != kernel.required_block:
        raise PTXError(f"block {block}, the kernel requires {kernel.required_block}")
    if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
        raise PTXError(f"grid {grid}: lengths must be 1 to 2147483647, 65535, 65535")
    if shared > MAXIMUM_SHARED:
        raise PTXError(f"{shared} bytes of shared memory, the most is {MAXIMUM_SHARED}")


def launch(
    ptx: str,
    name: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    dynamic_smem: int = 0,
    *,
    dev: Gpu | None = None,
    symbols: Mapping[str, Any] | None = None,
    strict: bool = True,
    **options: Any,
) -> Result:
    """Runs one kernel.

    args: one for each parameter. A numpy array becomes a device pointer and is copied back in place afterwards
    (read-only arrays are const on the device too); a DeviceArray of dev is a pointer; int and float are packed by the
    parameter's type; None is a null pointer; bytes or np.void is a struct by value. symbols: what to put into
    __device__ and __constant__ variables first. strict: raise PTXError at the end if there was an error among the
    findings. options: see wave.Options.
    """
    kernel = find_kernel(ptx, name)
    gpu = dev or Gpu()
    grid, block = _three(grid), _three(block)
    _check_limits(kernel, grid, block, dynamic_smem)
    if len(args) != len(kernel.parameters):
        raise TypeError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(args)}")
    gpu.load_variables(kernel.module)
    for symbol, value in (symbols or {}).items():
        gpu.write(gpu.symbols[symbol], np.ascontiguousarray(value).tobytes())
    copies: dict[int, tuple[np.ndarray, DeviceArray]] = {}  # by identity: the same array twice is the same memory
    parameters = bytearray(kernel.parameter_bytes)
    for i, (parameter, value) in enumerate(zip(kernel.parameters, args, strict=True)):
        if isinstance(value, np.ndarray):
            if parameter.size != 8 or not value.flags.c_contiguous:
                raise TypeError(
                    f"argument {i}: a C-contiguous array for a pointer expected, parameter {parameter.type}"
                )
            if id(value) not in copies:
                copies[id(value)] = value, gpu.array(value, f"arg{i}", readonly=not value.flags.writeable)
            value = copies[id(value)][1]
        parameters[parameter.offset : parameter.offset + parameter.size] = _pack(parameter, value)
    try:
        result = _run(Launch(kernel, gpu, bytes(parameters), grid, block, dynamic_smem, Options(**options)))
    finally:
        for array, device_array in copies.values():
            if array.flags.writeable:
                array[...] = device_array.get()
    if strict and result.errors:
        raise PTXError("findings:\n" + result.report())
    return result


def _run(launched: Launch) -> Result:
    kernel, options, statistics = launched.kernel, launched.options, launched.statistics
    decode(kernel)
    blocks = np.arange(math.prod(launched.grid))
    if options.block_order == "reverse":
        blocks = blocks[::-1]
    elif options.block_order == "random":
        blocks = np.random.default_rng(options.seed).permutation(blocks)
    warps = -(-math.prod(launched.block) // 32)
    shadow = (kernel.dynamic_offset + launched.dynamic_shared) // kernel.granule("shared") * (4 * warps + 16)
    together = 1
    if options.block_order == "together":
        together = max(1, min(options.max_lanes // (32 * warps), SHADOW_BYTES // max(shadow, 1)))
    start = time.perf_counter()
    with np.errstate(all="ignore"):
        for first in range(0, blocks.size, together):
            wave = Wave(launched, blocks[first : first + together])
            Scheduler(wave).run()
    statistics.seconds = time.perf_counter() - start
    statistics.threads = blocks.size * math.prod(launched.block)
    statistics.shared_bytes = wave.shared_bytes
    return Result(
        list(launched.findings.values()),
        statistics,
        launched.traffic.by_allocation() if options.traffic else {},
        list(launched.banks.sites.values()),
    )


def launch_all_schedules(
    ptx: str,
    name: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    make_args: Callable[[], Sequence[Any]],
    outputs: Sequence[int],
    dynamic_smem: int = 0,
    schedules: Sequence[Mapping[str, Any]] = ALL_SCHEDULES,
    **options: Any,
) -> list[Result]:
    """Runs under each schedule with fresh arguments; raises PTXError unless the outputs (indices of arrays) are the
    same bytes.
    """
    results, first = [], None
    for schedule in schedules:
        args = make_args()
        results.append(launch(ptx, name, grid, block, args, dynamic_smem, **{**options, **schedule}))
        found = [args[i].tobytes() for i in outputs]
        first = first or found
        if different := [i for i, a, b in zip(outputs, first, found, strict=True) if a != b]:
            raise PTXError(
                f"arguments {different} depend on the schedule: {dict(schedule)} against {dict(schedules[0])}"
            )
    return results
