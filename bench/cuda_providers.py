"""What bench_cuda.py compares: our ops, bitsandbytes' and torch's own, each on the same weights and with its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from exactness import differing, of_bound
from torch import Tensor
from weight import bytes_of

bnb: Any
try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None

ops = torch.ops.qlora_ext
OURS, COPY = "qlora_ext", "device copy"  # which is the limit, not a peer
FORMAT = ("nf4", 64)  # quant_type, blocksize
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Provider:
    """One way to compute a result.

    Args:
        name: as in the results.
        call: the result with copy i of the weight.
        error: of the result with copy 0; what counts as 1 or 0 is the bench's.
        allowed: the most that `error` may be. A peer's is recorded, whatever it is.
        unavailable: why it cannot run, if so.
        eager_only: why it cannot be captured into a graph, if so.
    """

    name: str
    call: Callable[[int], Any]
    error: Callable[[Any], float]
    allowed: float = float("inf")
    unavailable: str = ""
    eager_only: str = ""


def bitsandbytes(
    name: str, call: Callable[[int], Any], error: Callable[[Any], float], eager_only: str = ""
) -> Provider:
    """A provider that needs bitsandbytes."""
    unavailable = "" if bnb else "bitsandbytes is not installed"
    return Provider(name, call, error, unavailable=unavailable, eager_only=eager_only)


class Weights:
    """Distinct weights [N, K], so many that their 4-bit forms fill the cache four times, in each provider's form."""

    def __init__(self, N: int, K: int, cache_bytes: int, device: torch.device) -> None:
        self.N, self.K = N, K
        self.count = max(2, -(-4 * cache_bytes // (N * K // 2)))
        torch.manual_seed(0)
        self.source = [(torch.randn(N, K, device=device) * 0.02).to(DTYPE) for _ in range(self.count)]
        quantized = [_quantize(weight) for weight in self.source]
        self.arguments = [(*tensors, *FORMAT) for tensors in quantized]  # Q of the ops, of each copy
        self.dense = [ops.dequantize_4bit(*q, (N, K), DTYPE) for q in self.arguments]
        self.theirs = [_bitsandbytes_quantize(weight) for weight in self.source] if bnb else []
        self.packed_bytes = bytes_of(*quantized[0])  # of one copy, with its scales
        self.dense_bytes = bytes_of(self.dense[0])

    def decoded_on_cpu(self, dtype: torch.dtype) -> Tensor:
        """The first weight by the CPU's kernel, which the tests hold to the reference."""
        on_cpu = [t.cpu() if isinstance(t, Tensor) else t for t in self.arguments[0]]
        weight: Tensor = ops.dequantize_4bit(*on_cpu, (self.N, self.K), dtype)
        return weight


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, absmax = ops.quantize_4bit(weight, *FORMAT)
    return packed, *ops.quantize_absmax(absmax)


def _bitsandbytes_quantize(weight: Tensor) -> Any:
    return bnb.quantize_4bit(weight, quant_type=FORMAT[0], blocksize=FORMAT[1], compress_statistics=True)


def linear_providers(w: Weights, decoded: Tensor, x: Tensor) -> list[Provider]:
    """y = x @ W^T; decoded: the first weight in fp64."""
    error = partial(of_bound, x.double() @ decoded.T, F.linear(x, w.dense[0]))

    def gemm_4bit(i: int) -> Tensor:
        packed, state = w.theirs[i]
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            packed,
            state.shape,
            state.state2.absmax,
            state.blocksize,
            state.quant_type,
            absmax_8bit=state.absmax,
            absmax_code=state.state2.code,
            absmax_offset=state.offset,
        )
        return y

    return [
        Provider(OURS, lambda i: ops.linear_4bit(x, *w.arguments[i], w.N, None), error, allowed=1),
        bitsandbytes("bitsandbytes gemm_4bit", gemm_4bit, error),
        bitsandbytes(
            "bitsandbytes dequantize + linear", lambda i: F.linear(x, bnb.dequantize_4bit(*w.theirs[i])), error
        ),
        Provider("dense linear", lambda i: F.linear(x, w.dense[i]), error),
    ]


def dgrad_providers(w: Weights, decoded: Tensor, grad: Tensor) -> list[Provider]:
    """grad_x = grad @ W."""
    error = partial(of_bound, grad.double() @ decoded, grad @ w.dense[0])
    return [
        Provider(OURS, lambda i: ops.linear_4bit_dgrad(grad, *w.arguments[i], w.K), error, allowed=1),
        bitsandbytes("bitsandbytes dequantize + matmul", lambda i: grad @ bnb.dequantize_4bit(*w.theirs[i]), error),
        Provider("dense matmul", lambda i: grad @ w.dense[i], error),
    ]


def quantize_providers(w: Weights) -> list[Provider]:
    """Packed bytes and 8-bit scales of a dense weight; the error is the fraction of packed bytes unlike the CPU's."""
    packed = ops.quantize_4bit(w.source[0].cpu(), *FORMAT)[0]

    def error(got: tuple[Tensor, ...]) -> float:
        return differing(packed, got[0])

    host = "it copies a table from the host in each call"
    return [
        Provider(OURS, lambda i: _quantize(w.source[i]), error, allowed=0),
        bitsandbytes("bitsandbytes", lambda i: _bitsandbytes_quantize(w.source[i]), error, eager_only=host),
        copy_provider(w),
    ]


def dequantize_providers(w: Weights) -> list[Provider]:
    """The dense weight of packed bytes and 8-bit scales; the error is the fraction of values unlike the CPU's."""
    error = partial(differing, w.decoded_on_cpu(DTYPE))
    return [
        Provider(OURS, lambda i: ops.dequantize_4bit(*w.arguments[i], (w.N, w.K), DTYPE), error, allowed=0),
        bitsandbytes("bitsandbytes", lambda i: bnb.dequantize_4bit(*w.theirs[i]), error),
        copy_provider(w),
    ]


def copy_provider(w: Weights) -> Provider:
    """A device copy that reads and writes, together, the bytes of the dense and of the 4-bit weight."""
    half = (w.dense_bytes + w.packed_bytes) // 2
    dense = [weight.view(torch.uint8).view(-1)[:half] for weight in w.dense]
    return Provider(COPY, lambda i: dense[i].clone(), partial(differing, dense[0]))
