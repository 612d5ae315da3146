"""Who multiplies with a 4-bit weight on the CPU, and what a product is compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from exactness import OTHER_FORMAT, checked_rows, distance, of_bound
from suite import OURS, Case, MissingPeerError, Provider
from torch import Tensor
from weight import BLOCKSIZE, QUANT_TYPE, Weight

import qlora_ext

ops = torch.ops.qlora_ext


def linear(weight: Weight) -> list[Provider]:
    """y[M, N] = x[M, K] @ W.T"""
    return [
        Provider(OURS, partial(_ours, weight), _with_form(qlora_ext.linear_4bit), weight.packed_bytes),
        _decoding(weight, F.linear, "linear"),
        _bitsandbytes("bitsandbytes eval", weight, _bitsandbytes_repacked),
        _bitsandbytes("bitsandbytes training", weight, _bitsandbytes_quantized),
        *_dense(weight, F.linear, "linear"),
        _int4pack(weight),
        _torchao(weight, lambda x, form: F.linear(x, form.get_original_weight())),
    ]


def dgrad(weight: Weight) -> list[Provider]:
    """grad_x[M, K] = grad[M, N] @ W. Repacked weights (bitsandbytes eval, int4pack) have no such product."""

    def ours(grad: Tensor, packed: Tensor, state: qlora_ext.QuantState) -> Tensor:
        scales = (state.absmax, state.nested_absmax, state.nested_offset)
        grad_x: Tensor = ops.linear_4bit_dgrad(grad, packed, *scales, QUANT_TYPE, BLOCKSIZE, weight.K)
        return grad_x

    def training(grad: Tensor, packed: Tensor, state: Any) -> Tensor:
        import bitsandbytes.functional as bnb

        return grad @ bnb.dequantize_4bit(packed, state)  # what MatMul4Bit.backward does

    return [
        Provider(OURS, partial(_ours, weight), _with_form(ours), weight.packed_bytes),
        _decoding(weight, torch.matmul, "matmul"),
        Provider(
            "bitsandbytes training", partial(_bitsandbytes_quantized, weight), _with_form(training), weight.packed_bytes
        ),
        *_dense(weight, torch.matmul, "matmul"),
        _torchao(weight, lambda grad, form: grad @ form.get_original_weight()),
    ]


def product_case(weight: Weight, M: int, *, transposed: bool) -> Case:
    """The input of `linear` or, transposed, of `dgrad`, and the check of a result."""
    inner, outer = (weight.N, weight.K) if transposed else (weight.K, weight.N)
    x = weight.random(M, inner)
    picked = checked_rows(M)
    some = x[picked]
    matrix, dense = (weight.exact, weight.dense) if transposed else (weight.exact.T, weight.dense.T)
    exact, by_torch = some.double() @ matrix, some @ dense

    def check(name: str, y: Tensor) -> float:
        assert y.shape == (M, outer), f"its result has the shape {list(y.shape)}"
        return checked_error(name, exact, by_torch, y[picked])

    other_bytes = M * (inner + outer) * x.element_size()
    return Case(x, check, other_bytes, flops=2 * M * weight.N * weight.K)


def checked_error(name: str, exact: Tensor, by_torch: Tensor, got: Tensor) -> float:
    """The error as a fraction of the bound for ours, which a peer's may exceed: its format rounds in its own way."""
    error = of_bound(exact, by_torch, got)
    if name.startswith(OURS):
        assert error <= 1, f"its error is {error:.3g} of the bound"
    else:
        off = distance(exact, got)
        assert off <= OTHER_FORMAT, f"it computes something else: {off:.3g} off"
    return error


def _with_form(call: Callable[..., Tensor]) -> Callable[[Any, Tensor], Callable[[], Tensor]]:
    return lambda form, x: partial(call, x, *form)


def _ours(weight: Weight) -> tuple[Tensor, qlora_ext.QuantState]:
    return weight.packed, weight.state


def _decoding(weight: Weight, multiply: Callable[[Tensor, Tensor], Tensor], name: str) -> Provider:
    """Without a kernel that multiplies: what users of dequantize_4bit alone would have."""

    def call(x: Tensor, packed: Tensor, state: qlora_ext.QuantState) -> Tensor:
        return multiply(x, qlora_ext.dequantize_4bit(packed, state, x.dtype))

    moved = weight.packed_bytes
    return Provider(f"{OURS} dequantize_4bit + torch {name}", partial(_ours, weight), _with_form(call), moved)


def _dense(weight: Weight, multiply: Callable[[Tensor, Tensor], Tensor], name: str) -> list[Provider]:
    """torch's product with the decoded weight in the bench's dtype, and in fp32."""

    def provider(dtype: torch.dtype) -> Provider:
        def bind(form: Tensor, x: Tensor) -> Callable[[], Tensor]:
            return partial(multiply, x.to(dtype), form)

        size = weight.N * weight.K * dtype.itemsize
        return Provider(f"torch {str(dtype)[6:]} {name}", lambda: weight.decoded.to(dtype), bind, size)

    return [provider(dtype) for dtype in dict.fromkeys((weight.dtype, torch.float32))]


def _bitsandbytes(name: str, weight: Weight, make: Callable[[Weight], Any]) -> Provider:
    def call(x: Tensor, packed: Tensor, state: Any) -> Tensor:
        import bitsandbytes

        y: Tensor = bitsandbytes.matmul_4bit(x, packed, state)
        return y

    return Provider(name, partial(make, weight), _with_form(call), weight.packed_bytes)


def _bitsandbytes_quantized(weight: Weight) -> Any:
    """The form that it trains with: it decodes the whole weight, then multiplies."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise MissingPeerError("bitsandbytes is not installed") from error
    return bnb.quantize_4bit(
        weight.source, blocksize=BLOCKSIZE, quant_type=QUANT_TYPE, compress_statistics=weight.double_quant
    )


def _bitsandbytes_repacked(weight: Weight) -> Any:
    """The form that its layers take when they are called in eval mode, for its kernel."""
    packed, state = _bitsandbytes_quantized(weight)
    import bitsandbytes.functional as bnb

    held_to = os.environ.get("QLORA_EXT_CPU")  # it stands for a machine that has no more
    if (held_to and held_to not in ("avx512_bf16", "amx")) or not bnb.has_avx512bf16():
        raise MissingPeerError("without AVX512_BF16 its eval mode does what its training mode does")
    return bnb._convert_weight_packed_for_cpu(packed, state)


def _int4pack(weight: Weight) -> Provider:
    """torch's own 4-bit product: evenly spaced codes, a scale and a zero in the bench's dtype for each 64 weights."""

    def make() -> tuple[Tensor, Tensor]:
        blocks = weight.decoded.view(weight.N, -1, BLOCKSIZE)
        low, high = blocks.amin(-1), blocks.amax(-1)
        scale = (high - low).clamp(min=1e-8) / 15
        codes = ((blocks - low[..., None]) / scale[..., None]).round().clamp(0, 15).int()
        packed = ops_aten._convert_weight_to_int4pack_for_cpu(codes.view(weight.N, weight.K), 1)
        # It decodes as (code - 8) * scale + zero.
        scales_and_zeros = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).to(weight.dtype)
        return packed, scales_and_zeros.contiguous()

    def call(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
        y: Tensor = ops_aten._weight_int4pack_mm_for_cpu(x, packed, BLOCKSIZE, scales_and_zeros)
        return y

    size = weight.N * weight.K // 2 + weight.N * weight.K // BLOCKSIZE * 2 * weight.dtype.itemsize
    return Provider("torch int4pack", make, _with_form(call), size)


ops_aten = torch.ops.aten


def _torchao(weight: Weight, multiply: Callable[[Tensor, Any], Tensor]) -> Provider:
    """Its NF4Tensor, which it decodes before it multiplies."""
    return Provider(
        "torchao NF4",
        lambda: (torchao_nf4()(weight.source, BLOCKSIZE, 256),),
        _with_form(multiply),
        weight.packed_bytes,
        copied=False,
    )


def torchao_nf4() -> Callable[..., Any]:
    """Its function that quantizes, wherever this version keeps it."""
    try:
        from torchao.quantization import to_nf4
    except ImportError:
        try:
            from torchao.dtypes.nf4tensor import to_nf4
        except ImportError as error:
            raise MissingPeerError(f"torchao's NF4 cannot be imported: {error}") from error
    return to_nf4
