"""Our bytes are bitsandbytes' bytes, and where bitsandbytes 0.50.2 is wrong on the CPU ours is right."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import reference
import torch
from cases import BLOCKSIZES, DTYPES, QUANT_TYPES, normal
from reference import Quantized, assert_same

import qlora_ext

ops = torch.ops.qlora_ext


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nf4_bytes_and_absmax_are_equal(blocksize: int, cpu_path: str) -> None:
    weight = torch.randn(96, 4096)
    packed, absmax = ops.quantize_4bit(weight, "nf4", blocksize)
    bnb_packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    assert_same(packed.view(-1, 1), bnb_packed)
    assert_same(absmax.view(-1), state.absmax)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_fp4_decoded_values_are_equal(blocksize: int, cpu_path: str) -> None:
    """Not the bytes: for 0.0 bitsandbytes may write code 8, its second zero."""
    weight = torch.randn(96, 4096)
    packed, absmax = ops.quantize_4bit(weight, "fp4", blocksize)
    bnb_packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="fp4")
    assert_same(absmax.view(-1), state.absmax)
    decoded = ops.dequantize_4bit(packed, absmax, None, None, "fp4", blocksize, weight.shape, torch.float32)
    assert_same(decoded, bnb.dequantize_4bit(bnb_packed, state))


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_decodes_bitsandbytes_bytes(quant_type: str, blocksize: int, dtype: torch.dtype, nested: bool) -> None:
    """Against its format, computed from the tables in its own state, and against its own decoder."""
    weight = torch.randn(96, 4096).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    absmax, q = state.absmax, Quantized(packed, state.absmax, None, None, quant_type, blocksize)
    if nested:
        q = q._replace(nested_absmax=state.state2.absmax, nested_offset=state.offset)
        scale = state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * scale + state.offset
    nibbles = torch.cat([packed >> 4, packed & 15], dim=1).long()
    values = state.code[nibbles].view(-1, blocksize) * absmax[:, None]

    decoded = ops.dequantize_4bit(*q, weight.shape, dtype)
    assert_same(decoded, values.to(dtype).view(weight.shape))
    assert_same(decoded, bnb.dequantize_4bit(packed, state))


def test_scales_follow_the_flat_blocks_where_rows_are_no_multiple() -> None:
    """K = 4304: bitsandbytes reads scale row * (K // 64) + column // 64, a relative error of 0.245."""
    weight = normal(32, 4304, dtype=torch.bfloat16)
    packed, state = qlora_ext.quantize_4bit(weight, double_quant=False)
    bnb_packed, _ = bnb.quantize_4bit(weight, quant_type="nf4")
    assert_same(packed.view(-1, 1), bnb_packed)
    decoded = qlora_ext.dequantize_4bit(packed, state)
    assert_same(decoded, reference.dequantize_4bit(reference.quantize(weight), (32, 4304), torch.bfloat16))
    assert (decoded - weight).float().norm() / weight.float().norm() < 0.1


def test_zero_in_8_bits_is_zero() -> None:
    """bitsandbytes rounds to 65536 uniform steps first, and 0.0 becomes +2.1e-5 of the group's maximum."""
    absmax = torch.tensor([1.0, 3.0] + [2.0] * 254)
    codes, nested_absmax, offset = ops.quantize_absmax(absmax)
    assert offset == 2.0
    assert (codes[2:] == 127).all()
    decoded = reference.decode_absmax(Quantized(absmax, codes, nested_absmax, offset, "nf4", 64))
    assert_same(decoded[2:], absmax[2:])
