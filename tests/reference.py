"""The 4-bit format in plain PyTorch: the oracle that every kernel must equal bit for bit.

Written from the storage rules alone, and for reading, not for speed. Blocks run over the flattened tensor;
element 2j is the high nibble of byte j. The codebooks come from the extension; test_codebook.py derives them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_ext import _C

NESTED_BLOCKSIZE = 256
FLT_MAX = torch.finfo(torch.float32).max


class Quantized(NamedTuple):
    """The arguments Q of an op in their order; packed [..., K/2] and absmax [..., K/blocksize], or flat."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int


def codebook(name: str) -> Tensor:
    """The fp32 values of "nf4", "fp4" (16, by code) or "dynamic" (256, sorted)."""
    return torch.tensor(_C.codebook(name), dtype=torch.float32)


def as_blocks(values: Tensor, blocksize: int) -> Tensor:
    """[ceil(n / blocksize), blocksize]; the zeros behind the last value change no max |x| and no sum."""
    num_blocks = -(-values.numel() // blocksize)
    return F.pad(values.reshape(-1), (0, num_blocks * blocksize - values.numel())).view(num_blocks, blocksize)


def encode(x: Tensor, quant_type: str) -> Tensor:
    """4-bit code of each x: place i of the sorted table if i bounds (midpoints) lie below it."""
    table = codebook(quant_type)
    # FP4 holds 0.0 twice: code 8 is its negative twin, which is read but never written.
    codes = torch.tensor([code for code in range(16) if (quant_type, code) != ("fp4", 8)])
    codes = codes[table[codes].argsort()]
    bounds = (table[codes][:-1] + table[codes][1:]) / 2
    place = torch.bucketize(x, bounds)
    place[x.isnan()] = 0  # no bound lies below a NaN
    return codes[place]


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed, absmax) of a float weight of any shape."""
    blocks = as_blocks(weight.float(), blocksize)
    absmax = blocks.abs().amax(1)
    x = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    codes = encode(x.view(-1)[: weight.numel()], quant_type)
    if weight.numel() % 2:
        codes = torch.cat([codes, encode(torch.zeros(1), quant_type)])
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
    if weight.dim() and weight.shape[-1] % blocksize == 0:
        rows, k = weight.shape[:-1], weight.shape[-1]
        return packed.view(*rows, k // 2), absmax.view(*rows, k // blocksize)
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, nested_absmax, nested_offset): the scales in 8 bits, in groups of 256 around their mean."""
    total = 0.0
    column_sums = torch.zeros(-(-absmax.numel() // NESTED_BLOCKSIZE), dtype=torch.float64)
    for column in as_blocks(absmax.double(), NESTED_BLOCKSIZE).T:
        column_sums += column
    for group_sum in column_sums.tolist():  # not sum(): from Python 3.12 on it compensates
        total += group_sum
    offset = torch.tensor(total / max(absmax.numel(), 1), dtype=torch.float32)

    groups = as_blocks(absmax - offset, NESTED_BLOCKSIZE)
    nested_absmax = groups.abs().amax(1)
    x = groups * (1 / nested_absmax).clamp(max=FLT_MAX)[:, None]
    table = codebook("dynamic").double()
    bounds = (table[:-1] + table[1:]) / 2  # exact in fp64, as is the comparison: a tie goes to the lower code
    codes = torch.searchsorted(bounds, x.double()).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()].view(absmax.shape), nested_absmax, offset


def quantize(weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> Quantized:
    """Everything an op needs to read the weight back."""
    packed, absmax = quantize_4bit(weight, quant_type, blocksize)
    if not double_quant:
        return Quantized(packed, absmax, None, None, quant_type, blocksize)
    return Quantized(packed, *quantize_absmax(absmax), quant_type, blocksize)


def decode_absmax(q: Quantized) -> Tensor:
    """fp32 scales [num_blocks]; the product is rounded before the sum, never fused."""
    if q.nested_absmax is None:
        return q.absmax.reshape(-1)
    codes = q.absmax.reshape(-1)
    group = torch.arange(codes.numel()) // NESTED_BLOCKSIZE
    return codebook("dynamic")[codes.long()] * q.nested_absmax[group] + q.nested_offset


def dequantize_4bit(q: Quantized, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight: code * absmax, one fp32 multiply, then one rounding to dtype."""
    n = torch.Size(shape).numel()
    packed = q.packed.reshape(-1).long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    absmax = decode_absmax(q)[torch.arange(n) // q.blocksize]
    return (codebook(q.quant_type)[codes] * absmax).to(dtype).view(shape)


def dropout_mask(shape: tuple[int, ...], keep: float, seed: int, first: int = 0) -> Tensor:
    """Which elements dropout keeps: those whose hash is below keep * 2^32."""
    return torch.from_numpy(dropout_hashes(math.prod(shape), seed, first) < round(keep * 2**32)).view(shape)


def dropout_hashes(n: int, seed: int, first: int = 0) -> np.ndarray:
    """A number of 32 bits for each element, of the seed and its index, from `first` on."""
    index = np.arange(first, first + n, dtype=np.uint64)
    with np.errstate(over="ignore"):  # all of it modulo 2^64 or 2^32
        key = _mix(_mix(np.array(seed, dtype=np.int64).astype(np.uint64)) ^ index // 256)
        low, high = (key >> shift & 0xFFFFFFFF for shift in (0, 32))
        x = (low + index % 256 * 0x9E3779B9).astype(np.uint32)
        x = (x ^ x >> 16) * np.uint32(0x7FEB352D) ^ high.astype(np.uint32)
        hashes: np.ndarray = (x ^ x >> 15) * np.uint32(0x846CA68B)
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


# Equal values, dtype and shape. Only the sign of a zero and the payload of a NaN are free.
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def assert_as_exact_as_torch(got: Tensor, torch_result: Tensor, exact: Tensor) -> None:
    """max|got - exact| <= 2 max|torch_result - exact| + a unit in the last place of the largest exact value.

    `exact` is the fp64 result, `torch_result` that of plain PyTorch in the dtype of `got`.
    """
    assert (got.dtype, got.shape) == (torch_result.dtype, torch_result.shape)
    if got.numel():
        last_place = torch.finfo(got.dtype).eps * exact.abs().max()
        bound = 2 * (torch_result.double() - exact).abs().max() + last_place
        error = (got.double() - exact).abs().max()
        assert error <= bound, f"error {error:.3e} exceeds {bound:.3e}"
