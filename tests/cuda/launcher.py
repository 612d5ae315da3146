"""Calls the launchers of csrc/cuda, and runs what they launch in the PTX interpreter.

    device = Device(schedule="warp", offsets={"weight": 2})
    packed, absmax = device.quantize_4bit(weight, "nf4", 64)
    device.results[0].traffic["weight"].read.sectors

Grids, shared memory, workspaces and arguments are the launchers' own: no test repeats a rule of theirs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import torch
from ptx import PTXError
from recorded_gpu import Kernel, RecordedGpu, bytes_of, integers
from reference import NESTED_BLOCKSIZE, Quantized
from torch import Tensor

Outputs = TypeVar("Outputs", Tensor, "tuple[Tensor, ...]")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType
QUANT_TYPES = {"nf4": 0, "fp4": 1}  # enum QuantType
# Each shows bugs that the others hide.
SCHEDULES: tuple[dict[str, Any], ...] = (
    {},
    {"schedule": "warp", "cp_async": "eager"},
    {"schedule": "warp_rev", "block_order": "reverse", "atom_reverse": True},
)


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


class Device(RecordedGpu):
    """The launchers, called on one: see RecordedGpu for the options."""

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
        weight, part = integers(*self._put_weight(q)), integers(*rows, *columns)
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
        options = integers(*scalars, seed is not None, seed or 0)
        numbers = [number for one in slices for number in one.numbers]
        table = torch.zeros(self.library.functions.adamw_table_bytes(len(slices)), dtype=torch.uint8)
        count = ctypes.c_int64(len(slices))
        blocks = self.library.functions.fill_adamw_table(
            integers(*rows),
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
        product = integers(0, 0, 0, 0, 0, QUANT_TYPES["nf4"], 64, 0, 0, *mnk, DTYPES[torch.bfloat16])
        return int(getattr(self.library.functions, f"{op}_workspace_bytes")(product, integers(*self.limits)))

    def ctas(self, op: str, mnk: tuple[int, int, int]) -> int:
        """On how many CTAs a bf16 product with nf4 weights of blocksize 64 is launched. No array is there."""
        product = integers(0, 0, 0, 0, 0, QUANT_TYPES["nf4"], 64, 0, 0, *mnk, DTYPES[torch.bfloat16])
        recorded = self._record(op, product, integers(*self.limits), 0)
        [kernel] = [command for command in recorded if isinstance(command, Kernel)]
        return math.prod(kernel.grid)

    # --- their arguments ----------------------------------------------------------------------------------------------

    def _product(
        self, name: str, x: Tensor, q: Quantized, bias: Tensor | None, shape: tuple[int, int], mnk: tuple[int, int, int]
    ) -> Tensor:
        out = self._empty("out", shape, x.dtype)
        product, limits = self._operands(x, q, bias, out.address, mnk), integers(*self.limits)
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
        return integers(self._put("x", x), *weight, self._put("bias", bias), out, *mnk, DTYPES[x.dtype])

    def _put_weight(self, q: Quantized) -> list[int]:
        """struct Weight of shim.cpp."""
        addresses = [self._put(name, getattr(q, name)) for name in q._fields[:4]]
        return [*addresses, QUANT_TYPES[q.quant_type], q.blocksize]


def under_schedules(run: Callable[[Device], Outputs], **settings: Any) -> Outputs:
    """What each schedule gives: the same bytes. settings: of the Device."""
    outputs = [run(Device(**settings, **schedule)) for schedule in SCHEDULES]
    for schedule, output in zip(SCHEDULES, outputs, strict=True):
        for first, other in zip(_tensors(outputs[0]), _tensors(output), strict=True):
            if not torch.equal(bytes_of(first), bytes_of(other)):
                raise PTXError(f"the result depends on the schedule: {schedule} against {SCHEDULES[0]}")
    return outputs[0]


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
