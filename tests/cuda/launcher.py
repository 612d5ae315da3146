"""Calls the launchers of csrc/cuda, and runs what they launch in the PTX interpreter.

    device = Device(schedule="warp", offsets={"weight": 2})
    packed, absmax = device.quantize_4bit(weight, "nf4", 64)
    device.results[0].traffic["weight"].read.sectors

Grids, shared memory, workspaces and arguments are the launchers' own: no test repeats a rule of theirs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import library
import numpy as np
import torch
from ptx import DeviceArray, Gpu, PTXError, Result, launch
from ptx.decode import decode
from ptx.scheduler import Scheduler
from ptx.wave import Launch, Options, Wave
from reference import NESTED_BLOCKSIZE, Quantized
from torch import Tensor

Outputs = TypeVar("Outputs", Tensor, "tuple[Tensor, ...]")
STREAM = 0x5EED  # passed to every launcher, expected at every launch
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType
QUANT_TYPES = {"nf4": 0, "fp4": 1}  # enum QuantType
# Each shows bugs that the others hide.
SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    {"schedule": "warp", "cp_async": "eager"},
    {"schedule": "warp_rev", "block_order": "reverse", "atom_reverse": True},
)


class Limits(NamedTuple):
    """struct DeviceLimits."""

    num_sms: int = 4
    shared_bytes_per_sm: int = 164 * 1024


class AdamwSlice(NamedTuple):
    """struct AdamwSlice. numbers: lr, beta1, beta2, eps, weight_decay."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq_absmax: Tensor | None
    numbers: tuple[float, float, float, float, float]
    step: int
    maximize: bool = False
    first: int = 0
    index: int = 0


class LaunchError(Exception):
    """A launcher returned a cudaError_t, or used another stream."""


class _Kernel(NamedTuple):
    name: str
    grid: list[int]
    cta: list[int]
    arguments: list[bytes]
    shared_bytes: int


class _Memset(NamedTuple):
    address: int
    value: int
    size: int


class Device:
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

    # --- the launchers ------------------------------------------------------------------------------------------------

    def quantize_4bit(self, weight: Tensor, quant_type: str, blocksize: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """(packed, absmax), flat. first: the elements before `weight` that are not there."""
        n = weight.numel()
        self._missing = {"weight": first * weight.itemsize, "packed": first // 2, "absmax": first // blocksize * 4}
        self._skipped = Fraction(first, max(first + n, 1))
        packed = self._empty("packed", -(-n // 2), torch.uint8)
        absmax = self._empty("absmax", -(-n // blocksize), torch.float32)
        source = self._put("weight", weight)
        kind = DTYPES[weight.dtype], first + n, blocksize, QUANT_TYPES[quant_type]
        self._call("quantize_4bit", source, *kind, packed.address, absmax.address)
        return packed.tensor(), absmax.tensor()

    def quantize_absmax(self, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, nested_absmax, nested_offset)."""
        n = absmax.numel()
        groups = -(-n // NESTED_BLOCKSIZE)
        codes = self._empty("codes", n, torch.uint8)
        nested_absmax = self._empty("nested_absmax", groups, torch.float32)
        nested_offset = self._empty("nested_offset", (), torch.float32)
        source, sums = self._put("absmax", absmax), self._workspace(8 * groups)
        self._call("quantize_absmax", source, n, sums, codes.address, nested_absmax.address, nested_offset.address)
        return codes.tensor().view(absmax.shape), nested_absmax.tensor(), nested_offset.tensor()

    def dequantize_4bit(
        self,
        q: Quantized,
        K: int,
        rows: tuple[int, int],
        columns: tuple[int, int],
        dtype: torch.dtype,
        first_row: int = 0,
    ) -> Tensor:
        """The slice of the weight [*, K]. first_row: the rows before `q` that are not there."""
        blocks = first_row * K // q.blocksize
        scale = 4 if q.nested_absmax is None else 1
        self._missing = {
            "packed": first_row * K // 2,
            "absmax": blocks * scale,
            "nested_absmax": blocks // NESTED_BLOCKSIZE * 4,
        }
        out = self._empty("out", (rows[1] - rows[0], columns[1] - columns[0]), dtype)
        weight, part = _integers(*self._put_weight(q)), _integers(*rows, *columns)
        self._call("dequantize_4bit", weight, K, part, DTYPES[dtype], out.address)
        return out.tensor()

    def dropout_mask(self, n: int, keep: float, seed: int, first: int = 0) -> Tensor:
        """bool [n]. first: the elements before them that are not there."""
        self._missing, self._skipped = {"kept": first}, Fraction(first, max(first + n, 1))
        kept = self._empty("kept", n, torch.uint8)
        source = self._put("seed", torch.tensor(seed))
        self._call("dropout_mask", source, round(keep * 2**32), first + n, kept.address)
        return kept.tensor().bool()

    def linear_4bit(self, x: Tensor, q: Quantized, out_features: int, bias: Tensor | None = None) -> Tensor:
        """x[M, K] @ W[N, K]^T + bias."""
        (m, k), n = x.shape, out_features
        return self._product("linear_4bit", x, q, bias, (m, n), (m, n, k))

    def linear_4bit_dgrad(self, grad: Tensor, q: Quantized, in_features: int) -> Tensor:
        """grad[M, N] @ W[N, K]."""
        (m, n), k = grad.shape, in_features
        return self._product("linear_4bit_dgrad", grad, q, None, (m, k), (m, n, k))

    def adamw(
        self,
        slices: Sequence[AdamwSlice],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int | None = None,
    ) -> list[tuple[Tensor | None, ...]]:
        """Of each slice what it became: param, exp_avg, exp_avg_sq, their absmax. Arrays are named with its place."""
        outputs, rows = [], []
        for i, one in enumerate(slices):
            written = [one.param, *one[2:6]]
            names = [f"{name}{i}" for name in ("param", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")]
            arrays = [None if t is None else self._filled(name, t) for name, t in zip(names, written, strict=True)]
            param, *states = (0 if array is None else array.address for array in arrays)
            kinds = DTYPES[one.param.dtype], DTYPES[one.grad.dtype], one.param.numel(), one.first, one.index
            rows += [param, self._put(f"grad{i}", one.grad), *kinds, *states, one.step, one.maximize]
            outputs.append(arrays)
        scalars = self._put("grad_scale", grad_scale), self._put("found_inf", found_inf)
        options = _integers(*scalars, seed is not None, seed or 0)
        numbers = [number for one in slices for number in one.numbers]
        table = torch.zeros(self.library.functions.adamw_table_bytes(len(slices)), dtype=torch.uint8)
        count = ctypes.c_int64(len(slices))
        blocks = self.library.functions.fill_adamw_table(
            _integers(*rows),
            (ctypes.c_double * len(numbers))(*numbers),
            count,
            options,
            ctypes.c_int64(table.data_ptr()),
        )
        self._call("adamw", self._put("table", table), len(slices), blocks, options)
        return [tuple(None if array is None else array.tensor() for array in arrays) for arrays in outputs]

    def takes_fused(self, x: Tensor, q: Quantized, mnk: tuple[int, int, int]) -> bool:
        return bool(self.library.functions.takes_fused(self._operands(x, q, None, 0, mnk)))

    def workspace_bytes(self, op: str, mnk: tuple[int, int, int]) -> int:
        """Of a bf16 product with nf4 weights of blocksize 64. No array is there."""
        product = _integers(0, 0, 0, 0, 0, QUANT_TYPES["nf4"], 64, 0, 0, *mnk, DTYPES[torch.bfloat16])
        return int(getattr(self.library.functions, f"{op}_workspace_bytes")(product, _integers(*self.limits)))

    def ctas(self, op: str, mnk: tuple[int, int, int]) -> int:
        """On how many CTAs a bf16 product with nf4 weights of blocksize 64 is launched. No array is there."""
        product = _integers(0, 0, 0, 0, 0, QUANT_TYPES["nf4"], 64, 0, 0, *mnk, DTYPES[torch.bfloat16])
        recorded = self._record(op, product, _integers(*self.limits), 0)
        [kernel] = [command for command in recorded if isinstance(command, _Kernel)]
        return math.prod(kernel.grid)

    # --- their arguments ----------------------------------------------------------------------------------------------

    def _product(
        self, name: str, x: Tensor, q: Quantized, bias: Tensor | None, shape: tuple[int, int], mnk: tuple[int, int, int]
    ) -> Tensor:
        out = self._empty("out", shape, x.dtype)
        product, limits = self._operands(x, q, bias, out.address, mnk), _integers(*self.limits)
        functions = self.library.functions
        taken = functions.takes_fused(product)  # else there is no workspace to ask for, and an error to be seen
        size = getattr(functions, f"{name}_workspace_bytes")(product, limits) if taken else 0
        self._call(name, product, limits, self._workspace(size))
        return out.tensor()

    def _operands(
        self, x: Tensor, q: Quantized, bias: Tensor | None, out: int, mnk: tuple[int, int, int]
    ) -> ctypes.Array[ctypes.c_int64]:
        """struct Product of shim.cpp."""
        weight = self._put_weight(q)
        return _integers(self._put("x", x), *weight, self._put("bias", bias), out, *mnk, DTYPES[x.dtype])

    def _put_weight(self, q: Quantized) -> list[int]:
        """struct Weight of shim.cpp."""
        addresses = [self._put(name, getattr(q, name)) for name in q._fields[:4]]
        return [*addresses, QUANT_TYPES[q.quant_type], q.blocksize]

    def _put(self, name: str, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        array = self.gpu.array(_bytes(tensor).numpy(), name, readonly=True, offset=self.offsets.get(name, 0))
        return array.address - self._missing.get(name, 0)

    def _empty(self, name: str, shape: int | tuple[int, ...], dtype: torch.dtype) -> _Output:
        shape = (shape,) if isinstance(shape, int) else shape
        size = math.prod(shape) * dtype.itemsize
        array = self.gpu.empty(size, "u1", name, self.offsets.get(name, 0))
        return _Output(array, array.address - self._missing.get(name, 0), shape, dtype)

    def _filled(self, name: str, tensor: Tensor) -> _Output:
        """An array that is read and written."""
        output = self._empty(name, tuple(tensor.shape), tensor.dtype)
        self.gpu.write(output.address, _bytes(tensor).numpy().tobytes())
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

    def _record(self, name: str, *arguments: int | ctypes.Array[ctypes.c_int64]) -> list[_Kernel | _Memset]:
        """What a function of shim.cpp launched. Its last argument is the stream."""
        recorded: list[_Kernel | _Memset] = []
        streams = set()

        def record_launch(kernel: bytes, grid: Any, cta: Any, shared_bytes: int, stream: int, values: Any) -> None:
            parameters = self.library.kernel(kernel.decode()).parameters
            data = [ctypes.string_at(values[i], parameter.size) for i, parameter in enumerate(parameters)]
            recorded.append(_Kernel(kernel.decode(), list(grid[0]), list(cta[0]), data, shared_bytes))
            streams.add(stream)

        def record_memset(address: int, value: int, size: int, stream: int) -> None:
            recorded.append(_Memset(address, value, size))
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

    def _run(self, command: _Kernel | _Memset) -> None:
        if isinstance(command, _Memset):
            end = command.address + command.size
            if not any(one.start <= command.address and end <= one.end for one in self.gpu.allocations):
                raise PTXError(f"memset of {command.size} bytes at {self.gpu.describe(command.address)}")
            self.gpu.write(command.address, bytes([command.value & 0xFF]) * command.size)
        elif not self._skipped:
            text = self.library.ptx[command.name]
            self.results.append(launch(text, *command, dev=self.gpu, **self.options))
        else:
            self._run_end(command)

    def _run_end(self, command: _Kernel) -> None:
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


class _Output(NamedTuple):
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


def _integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def under_schedules(run: Callable[[Device], Outputs], **settings: Any) -> Outputs:
    """What each schedule gives: the same bytes. settings: of the Device."""
    outputs = [run(Device(**settings, **schedule)) for schedule in SCHEDULES]
    for schedule, output in zip(SCHEDULES, outputs, strict=True):
        for first, other in zip(_tensors(outputs[0]), _tensors(output), strict=True):
            if not torch.equal(_bytes(first), _bytes(other)):
                raise PTXError(f"the result depends on the schedule: {schedule} against {SCHEDULES[0]}")
    return outputs[0]


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
