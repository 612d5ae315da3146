"""Loads the compiled module, with its ops, kernels and gradients; tells torch the shapes of the ops' results, and how
many floating-point operations they take (torch.utils.flop_counter)."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    from qlora_ext import _C
except ImportError as error:
    if str(error).startswith("QLORA_EXT_CPU"):  # it does load, but for what the environment asks of it
        raise
    folder = Path(__file__).parent  # of a checkout, maybe: what is installed is behind it
    if not any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise ImportError(
            f"qlora_ext: {folder} has no compiled module _C for this Python. If qlora_ext is installed, start Python "
            f"outside {folder.parent}; to use these sources, `pip install --no-build-isolation -e .` there."
        ) from None
    raise ImportError(
        "qlora_ext: its compiled module _C does not load. Build it with `pip install --no-build-isolation -e .` "
        f"under the installed torch {torch.__version__}. The reason: {error}"
    ) from error

ops = torch.ops.qlora_ext
codebook = _C.codebook
NESTED_BLOCKSIZE = _C.NESTED_BLOCKSIZE  # values of absmax


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _same_device(op: str, first: Tensor, **others: Tensor | list[Tensor] | None) -> None:
    """A meta tensor among real ones reaches these functions instead of a kernel: that is an error, not a shape."""
    for name, given in others.items():
        for tensor in given if isinstance(given, list) else [given]:
            if tensor is not None and tensor.device != first.device:
                raise ValueError(f"{op}: {name}: expected device {first.device}, got {tensor.device}")


def _one_each(op: str, A: list[Tensor], **others: list[Any]) -> None:
    """What the kernels check, but the backward of no kernel's would rely on."""
    for name, given in others.items():
        if len(given) != len(A) and (given or name != "dropout_mask"):
            raise ValueError(f"{op}: {name}: expected {len(A)} as in A, got {len(given)}")


@torch.library.register_fake("qlora_ext::quantize_4bit")
def _(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    def layout(per: int) -> list[int]:
        if weight.dim() == 0 or weight.size(-1) % blocksize:
            return [ceil_div(weight.numel(), per)]
        return [*weight.shape[:-1], weight.shape[-1] // per]

    packed = weight.new_empty(layout(2), dtype=torch.uint8)
    return packed, weight.new_empty(layout(blocksize), dtype=torch.float32)


@torch.library.register_fake("qlora_ext::quantize_absmax")
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = ceil_div(absmax.numel(), NESTED_BLOCKSIZE)
    codes = torch.empty_like(absmax, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return codes, absmax.new_empty([groups]), absmax.new_empty([])


@torch.library.register_fake("qlora_ext::dequantize_4bit")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    _same_device("dequantize_4bit", packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset)
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qlora_ext::dequantize_4bit.out")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    *,
    out: Tensor,
) -> None:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _same_device("dequantize_4bit", packed, **scales, out=out)


@torch.library.register_fake("qlora_ext::linear_4bit")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _same_device("linear_4bit", x, packed=packed, **scales, bias=bias)
    return x.new_empty([*x.shape[:-1], out_features])


@torch.library.register_fake("qlora_ext::linear_4bit_dgrad")
def _(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _same_device("linear_4bit_dgrad", grad, packed=packed, **scales)
    return grad.new_empty([*grad.shape[:-1], in_features])


@torch.library.register_fake("qlora_ext::lora_linear_4bit")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    scaling: list[float],
    dropout_mask: list[Tensor],
) -> tuple[Tensor, Tensor]:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _same_device("lora_linear_4bit", x, packed=packed, **scales, bias=bias, A=A, B=B, dropout_mask=dropout_mask)
    _one_each("lora_linear_4bit", A, B=B, scaling=scaling, dropout_mask=dropout_mask)
    y = x.new_empty([*x.shape[:-1], out_features])
    return y, x.new_empty([prod(x.shape[:-1]), sum(a.shape[0] for a in A)])


@torch.library.register_fake("qlora_ext::lora_linear_4bit_backward")
def _(
    grad: Tensor,
    x: Tensor,
    xA: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    A: list[Tensor],
    B: list[Tensor],
    scaling: list[float],
    dropout_mask: list[Tensor],
    with_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    adapters = {"A": A, "B": B, "dropout_mask": dropout_mask}
    _same_device("lora_linear_4bit_backward", grad, x=x, xA=xA, packed=packed, **scales, **adapters)
    ranks = sum(a.shape[0] for a in A)
    grad_x = grad.new_empty([*grad.shape[:-1], x.shape[-1]] if with_grad_x else [0])
    grad_A, grad_B = (grad.new_empty([ranks, size], dtype=torch.float32) for size in (x.shape[-1], grad.shape[-1]))
    return grad_x, grad_A, grad_B


# Two operations a multiply-add, as torch counts its own products, and none for decoding. Tensors come as their shapes.


@register_flop_formula([ops.linear_4bit, ops.linear_4bit_dgrad])
def _(x: torch.Size, *others: object, out_shape: torch.Size, **_: object) -> int:
    return 2 * x.numel() * out_shape[-1]


@register_flop_formula(ops.lora_linear_4bit)
def _(x: torch.Size, *others: object, out_shape: tuple[torch.Size, torch.Size], **_: object) -> int:
    y, xA = out_shape
    return 2 * x.numel() * (y[-1] + xA[-1]) + 2 * xA.numel() * y[-1]


@register_flop_formula(ops.lora_linear_4bit_backward)
def _(
    grad: torch.Size,
    x: torch.Size,
    xA: torch.Size,
    *others: object,
    out_shape: tuple[torch.Size, torch.Size, torch.Size],
    **_: object,
) -> int:
    grad_xA_and_B, grad_A = 2 * 2 * grad.numel() * xA[-1], 2 * x.numel() * xA[-1]
    return grad_xA_and_B + grad_A + 2 * out_shape[0].numel() * (grad[-1] + xA[-1])  # grad x, or [0]
