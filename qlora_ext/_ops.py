"""Loads the compiled module, with its ops, kernels and gradients; tells torch the shapes of the ops' results."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def _fake(op: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of the op's arguments, by name, that makes results of the right shape and no content."""
    names = [argument.name for argument in op._schema.arguments]

    def register(results: Callable[..., Any]) -> Any:
        def fake(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            _check_devices(op, given)
            return results(**given)

        return torch.library.register_fake(op, fake)

    return register


def _check_devices(op: torch._ops.OpOverload, given: dict[str, Any]) -> None:
    """A meta tensor among real ones comes here, not to a kernel: that is an error, not a question of shapes."""
    listed = ((name, value if isinstance(value, (list, tuple)) else [value]) for name, value in given.items())
    tensors = [(name, value) for name, values in listed for value in values if isinstance(value, Tensor)]
    for name, tensor in tensors:
        if tensor.device != (device := tensors[0][1].device):
            op_name = op._schema.name.removeprefix("qlora_ext::")
            raise ValueError(f"{op_name}: {name}: expected device {device}, got {tensor.device}")


@_fake(ops.quantize_4bit.default)
def _(weight: Tensor, blocksize: int, **_: Any) -> tuple[Tensor, Tensor]:
    if blocksize <= 0:
        raise ValueError(f"quantize_4bit: blocksize: expected a power of two from 32 to 4096, got {blocksize}")

    def layout(per: int) -> list[int]:
        if weight.dim() == 0 or weight.size(-1) % blocksize:
            return [ceil_div(weight.numel(), per)]
        return [*weight.shape[:-1], weight.shape[-1] // per]

    packed = weight.new_empty(layout(2), dtype=torch.uint8)
    return packed, weight.new_empty(layout(blocksize), dtype=torch.float32)


@_fake(ops.quantize_absmax.default)
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = ceil_div(absmax.numel(), NESTED_BLOCKSIZE)
    codes = torch.empty_like(absmax, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return codes, absmax.new_empty([groups]), absmax.new_empty([])


@_fake(ops.dequantize_4bit.default)
def _(packed: Tensor, shape: list[int], dtype: torch.dtype, **_: Any) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@_fake(ops.dequantize_4bit.out)
def _(**_: Any) -> None:
    pass


@_fake(ops.linear_4bit.default)
def _(x: Tensor, out_features: int, **_: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], out_features])


@_fake(ops.linear_4bit_dgrad.default)
def _(grad: Tensor, in_features: int, **_: Any) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], in_features])


def _check_lists(op: str, expected: dict[str, int], **lists: Any) -> None:
    """Of adapters: the backward pass, with no kernel to check them, counts on this."""
    for name, count in expected.items():
        if len(lists[name]) != count:
            raise ValueError(f"{op}: {name}: expected {count} as in A, got {len(lists[name])}")


@_fake(ops.lora_linear_4bit.default)
def _(
    x: Tensor, out_features: int, A: list[Tensor], keep: list[float], seed: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor]:
    expected = {"B": len(A), "scaling": len(A), "keep": len(A) if keep else 0, "seed": len(keep)}
    _check_lists("lora_linear_4bit", expected, keep=keep, seed=[] if seed is None else seed.flatten(), **others)
    y = x.new_empty([*x.shape[:-1], out_features])
    return y, x.new_empty([prod(x.shape[:-1]), sum(a.shape[0] for a in A)])


@_fake(ops.lora_linear_4bit_backward.default)
def _(
    grad: Tensor,
    x: Tensor,
    A: list[Tensor],
    with_grad_x: bool,
    with_grad_A: bool,
    with_grad_B: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    ranks = sum(a.shape[0] for a in A)
    grad_x = grad.new_empty([*grad.shape[:-1], x.shape[-1]] if with_grad_x else [0])
    grad_A = grad.new_empty([ranks, x.shape[-1]] if with_grad_A else [0], dtype=torch.float32)
    grad_B = grad.new_empty([ranks, grad.shape[-1]] if with_grad_B else [0], dtype=torch.float32)
    return grad_x, grad_A, grad_B


@_fake(ops.dropout_mask.default)
def _(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


@_fake(ops.experts_4bit.default)
def _(x: Tensor, out_features: int, **_: Any) -> Tensor:
    return x.new_empty([x.shape[0], out_features])


@_fake(ops.lora_experts_4bit.default)
def _(x: Tensor, out_features: int, A: list[Tensor], **others: Any) -> tuple[Tensor, Tensor]:
    _check_lists("lora_experts_4bit", {"B": len(A), "scaling": len(A)}, **others)
    return x.new_empty([x.shape[0], out_features]), x.new_empty([x.shape[0], sum(a.shape[1] for a in A)])


@_fake(ops.lora_experts_4bit_backward.default)
def _(
    grad: Tensor,
    x: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    with_grad_x: bool,
    with_grad_A: bool,
    with_grad_B: bool,
    **_: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_A, grad_B = (
        [each.new_empty(each.shape, dtype=torch.float32) for each in factors] if wanted else []
        for wanted, factors in ((with_grad_A, A), (with_grad_B, B))
    )
    return grad.new_empty(x.shape if with_grad_x else [0]), grad_A, grad_B
