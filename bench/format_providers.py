"""Who quantizes to 4 bits and decodes them again on the CPU, each held to the reference of the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from exactness import OTHER_FORMAT, differing, distance
from linear_providers import torchao_nf4
from suite import OURS, Case, MissingPeerError, Provider
from torch import Tensor
from weight import BLOCKSIZE, QUANT_TYPE, Weight

import qlora_ext

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import reference

CHECKED_ROWS = 256  # the reference is written for reading: a whole weight would take it longer than the bench
TORCHAO = "torchao NF4"


def quantize(weight: Weight) -> list[Provider]:
    """The packed bytes and scales of weight.source."""
    size = weight.source.numel() * weight.source.element_size()
    ours = partial(
        qlora_ext.quantize_4bit, quant_type=QUANT_TYPE, blocksize=BLOCKSIZE, double_quant=weight.double_quant
    )
    theirs = partial(_bitsandbytes_quantize, weight.double_quant)
    providers = [
        Provider(OURS, lambda: weight.source, _of_form(ours), size),
        Provider("bitsandbytes", partial(_if_bitsandbytes, weight.source), _of_form(theirs), size),
    ]
    if weight.double_quant:  # torchao always quantizes its scales
        providers.append(Provider(TORCHAO, partial(_if_torchao, weight.source), _of_form(_torchao_quantize), size))
    return providers


def quantize_case(weight: Weight, _: None) -> Case:
    """Packed bytes as the reference has them; with double quantization also the scales' codes."""
    some = weight.source[:CHECKED_ROWS]
    packed, absmax = reference.quantize_4bit(some, QUANT_TYPE, BLOCKSIZE)

    def check(name: str, result: Any) -> float:
        if name == TORCHAO:
            return _checked_distance(weight.source, result.get_original_weight())
        got_packed, state = result
        error = differing(packed, got_packed.view(weight.N, -1)[: len(some)])
        if name == OURS:
            expected = absmax
            if weight.double_quant:
                whole = qlora_ext.quantize_4bit(weight.source, double_quant=False)[1].absmax
                expected = reference.quantize_absmax(whole)[0][: len(some)]
            error += differing(expected, state.absmax[: len(some)])
            assert error == 0, f"{error:.3g} of its packed bytes and scales are not the reference's"
        return error

    return Case(None, check, weight.packed_bytes, copying=True)


def dequantize(weight: Weight) -> list[Provider]:
    """The weight in its own dtype from its 4-bit form."""
    return [
        Provider(OURS, lambda: (weight.packed, weight.state), _of_form(_decode), weight.packed_bytes),
        Provider(
            "bitsandbytes", partial(_bitsandbytes_form, weight), _of_form(_bitsandbytes_decode), weight.packed_bytes
        ),
        Provider(
            TORCHAO,
            lambda: _torchao_quantize(weight.source),
            _of_form(lambda form: form.get_original_weight()),
            weight.packed_bytes,
            copied=False,
        ),
    ]


def dequantize_out(weight: Weight) -> list[Provider]:
    """The same into memory that is there, beside a copy of the dense weight: bitsandbytes has no out= on the CPU."""
    size = weight.source.numel() * weight.source.element_size()
    return [
        Provider(
            OURS,
            lambda: (weight.packed, weight.state, torch.zeros_like(weight.source)),
            _of_form(lambda form: qlora_ext.dequantize_4bit(*form[:2], out=form[2])),
            weight.packed_bytes,
        ),
        Provider(
            "torch copy_",
            lambda: (qlora_ext.dequantize_4bit(weight.packed, weight.state), torch.zeros_like(weight.source)),
            _of_form(lambda form: form[1].copy_(form[0])),
            size,
        ),
    ]


def dequantize_case(weight: Weight, _: None) -> Case:
    """Values as the reference decodes them."""
    rows, state = min(weight.N, CHECKED_ROWS), weight.state
    some = reference.Quantized(
        weight.packed[:rows], state.absmax[:rows], state.nested_absmax, state.nested_offset, QUANT_TYPE, BLOCKSIZE
    )
    expected = reference.dequantize_4bit(some, (rows, weight.K), weight.dtype)

    def check(name: str, decoded: Tensor) -> float:
        error = differing(expected, decoded[:rows])
        if name == OURS:
            assert error == 0, f"{error:.3g} of its values are not the reference's"
        else:
            _checked_distance(expected, decoded[:rows])
        return error

    return Case(None, check, weight.source.numel() * weight.source.element_size(), copying=True)


def _of_form(call: Callable[[Any], Any]) -> Callable[[Any, None], Callable[[], Any]]:
    return lambda form, _: partial(call, form)


def _decode(form: tuple[Tensor, qlora_ext.QuantState]) -> Tensor:
    return qlora_ext.dequantize_4bit(*form)


def _checked_distance(expected: Tensor, got: Tensor) -> float:
    off = distance(expected, got)
    assert off <= OTHER_FORMAT, f"it computes something else: {off:.3g} off"
    return off


def _if_bitsandbytes(form: Any) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingPeerError("bitsandbytes is not installed") from error
    return form


def _if_torchao(form: Any) -> Any:
    torchao_nf4()
    return form


def _bitsandbytes_quantize(double_quant: bool, source: Tensor) -> Any:
    import bitsandbytes.functional as bnb

    return bnb.quantize_4bit(source, blocksize=BLOCKSIZE, quant_type=QUANT_TYPE, compress_statistics=double_quant)


def _bitsandbytes_form(weight: Weight) -> Any:
    return _bitsandbytes_quantize(weight.double_quant, _if_bitsandbytes(weight.source))


def _bitsandbytes_decode(form: Any) -> Tensor:
    import bitsandbytes.functional as bnb

    decoded: Tensor = bnb.dequantize_4bit(*form)
    return decoded


def _torchao_quantize(source: Tensor) -> Any:
    return torchao_nf4()(source, BLOCKSIZE, 256)
