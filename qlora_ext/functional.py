"""The three functions of the format: quantize_4bit, dequantize_4bit, linear_4bit."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from qlora_ext._ops import ops
from qlora_ext.quant_state import QuantState, check_type


def quantize_4bit(
    weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor to 4 bits a value, blockwise.

    In plain PyTorch, for a block w of `blocksize` consecutive elements of weight.flatten():
    `absmax = w.abs().max(); rank = (w[:, None] * (1 / absmax) > bounds).sum(1)`. The rank is NF4's code; FP4's values
    are not in the order of their codes: there the code is looked up. Two codes a byte, the first in the high half.

    Args:
        weight: float32, float16 or bfloat16, any shape and device.
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, a power of two from 32 to 4096.
        double_quant: store absmax in 8 bits (4.127 instead of 4.5 bits a weight at blocksize 64).

    Returns:
        packed: uint8; [..., in/2] if in, the last dimension, is a multiple of blocksize, else flat [ceil(n/2)].
        state: the QuantState that reads it, on weight's device.

    Raises:
        TypeError: an argument of the wrong kind, or a weight of another dtype.
        ValueError: quant_type or blocksize is none of the above, or weight holds NaN or Inf (not checked under
            torch.compile, which traces without values: they then reach absmax).

    Source: QLoRA, arXiv 2305.14314, section 3; the bytes are bitsandbytes'.
    """
    check_type("quantize_4bit", "weight", weight, Tensor)
    check_type("quantize_4bit", "quant_type", quant_type, str)
    check_type("quantize_4bit", "blocksize", blocksize, Integral)
    if blocksize >= 2**63:  # the op takes no such number, and says so in words of its own
        raise ValueError(f"quantize_4bit: blocksize: expected a power of two from 32 to 4096, got {blocksize}")
    packed, absmax = ops.quantize_4bit(weight.detach(), quant_type, blocksize)
    if has_values(absmax) and not absmax.amax().isfinite():  # of NaN, too: the maximum is NaN
        blocks = absmax.flatten().isfinite().logical_not().nonzero().flatten()
        raise ValueError(
            f"quantize_4bit: weight: expected finite values, got NaN or Inf in {len(blocks)} of {absmax.numel()} "
            f"blocks of {blocksize}, the first at element {int(blocks[0]) * blocksize}"
        )
    scales = ops.quantize_absmax(absmax) if double_quant else (absmax,)
    return packed, QuantState(weight.shape, weight.dtype, quant_type, blocksize, *scales)


def dequantize_4bit(
    packed: Tensor, state: QuantState, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The tensor that 4-bit bytes stand for: `codebook[code] * absmax` of its block, rounded once.

    Args:
        packed: uint8, as from `quantize_4bit`.
        state: its QuantState.
        dtype: float32, float16 or bfloat16; None: out's, or state.dtype.
        out: a contiguous tensor of state.shape and dtype, on packed's device, to write to. On the CPU a large result
            takes about half the time where its memory has been written before.

    Returns:
        out, or a new tensor of state.shape and dtype on packed's device.

    Raises:
        TypeError: a tensor or dtype of the wrong kind.
        ValueError: sizes or devices that do not fit together, or an out that wants a gradient.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    check_type("dequantize_4bit", "packed", packed, Tensor)
    check_type("dequantize_4bit", "state", state, QuantState)
    if dtype is not None:
        check_type("dequantize_4bit", "dtype", dtype, torch.dtype)
    if out is not None:
        _check_out(out, state, dtype)
        ops.dequantize_4bit.out(packed, *_weight_arguments(state), out=out)
        return out
    weight: Tensor = ops.dequantize_4bit(packed, *_weight_arguments(state), state.shape, dtype or state.dtype)
    return weight


def linear_4bit(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, dequantize_4bit(packed, state, x.dtype), bias)`, with gradients for x and bias, not for the weight.

    Args:
        x: float32, float16 or bfloat16 [..., in]; under autocast it is cast as by F.linear.
        packed: uint8, as from `quantize_4bit` of a weight [out, in].
        state: its QuantState.
        bias: [out] or None; cast to x's dtype.

    Returns:
        [..., out] in x's dtype (autocast: in autocast's).

    Raises:
        TypeError: a tensor of the wrong kind or dtype.
        ValueError: shapes, sizes or devices that do not fit together.

    Source: QLoRA, arXiv 2305.14314, equation 5.
    """
    check_type("linear_4bit", "packed", packed, Tensor)
    check_matrix("linear_4bit", state, x)
    if bias is not None:
        check_type("linear_4bit", "bias", bias, Tensor)
    x = cast_as_autocast(x)
    y: Tensor = ops.linear_4bit(x, packed, *_weight_arguments(state), state.shape[0], bias)
    return y


def cast_as_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on and would cast the input of F.linear, else x itself."""
    if (
        not x.is_meta
        and torch.is_autocast_enabled(x.device.type)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def check_matrix(op: str, state: QuantState, x: Tensor) -> None:
    """Raise TypeError or ValueError unless the state is of a matrix [out, in] and x is [..., in]."""
    check_type(op, "x", x, Tensor)
    check_type(op, "state", state, QuantState)
    if len(state.shape) != 2:
        raise ValueError(f"{op}: state.shape: expected [out, in], got {list(state.shape)}")
    if x.dim() == 0 or x.shape[-1] != state.shape[1]:
        raise ValueError(f"{op}: x: expected [..., {state.shape[1]}], got {list(x.shape)}")


def has_values(tensor: Tensor) -> bool:
    """Whether there are values to look at: not if it is empty, on meta, in FakeTensorMode or traced by a compiler."""
    return not (torch.compiler.is_compiling() or is_fake(tensor) or tensor.is_meta or tensor.numel() == 0)


def _weight_arguments(state: QuantState) -> tuple[Tensor, Tensor | None, Tensor | None, str, int]:
    return state.absmax, state.nested_absmax, state.nested_offset, state.quant_type, state.blocksize


def _check_out(out: Tensor, state: QuantState, dtype: torch.dtype | None) -> None:
    check_type("dequantize_4bit", "out", out, Tensor)
    if out.shape != state.shape:
        raise ValueError(f"dequantize_4bit: out: expected shape {list(state.shape)}, got {list(out.shape)}")
    if dtype not in (None, out.dtype):
        raise TypeError(f"dequantize_4bit: out: expected dtype {dtype}, got {out.dtype}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("dequantize_4bit: out: expected a tensor that wants no gradient (or torch.no_grad), got one")
