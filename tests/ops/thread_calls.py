"""Calls of every op that are enough for several threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import normal, quantized_normal
from torch import Tensor

ops = torch.ops.qlora_ext
M, N, K = 128, 384, 2048
Q = quantized_normal((N, K), "nf4", 64, double_quant=True)
FLAT_K = 2000  # no multiple of the blocksize
FLAT_Q = quantized_normal((N, FLAT_K), "nf4", 64, double_quant=True)
WEIGHT, X, GRAD = normal(N, K), normal(M, K), normal(M, N)
ABSMAX = WEIGHT.abs()
A, B = [normal(8, K)], [normal(N, 8)]
XA, DROPOUT = normal(M, 8), ([0.9], torch.tensor([7]))
ENDS = torch.tensor([1, 1, 40, M])  # of the rows of 4 experts

# Each op in a dtype, and the products with a number of rows.
CALLS: dict[str, Callable[[torch.dtype], Tensor | tuple[Tensor, ...]]] = {
    "quantize_4bit": lambda dtype: ops.quantize_4bit(WEIGHT.to(dtype), "nf4", 64),
    "quantize_absmax": lambda _: ops.quantize_absmax(ABSMAX),
    "dequantize_4bit": lambda dtype: ops.dequantize_4bit(*Q, (N, K), dtype),
    "dropout_mask": lambda dtype: ops.dropout_mask(X.to(dtype), 0.9, DROPOUT[1]),
}
for m in (1, 4, 40, M):
    CALLS |= {
        f"linear_4bit-M{m}": lambda dtype, m=m: ops.linear_4bit(X[:m].to(dtype), *Q, N, None),
        f"linear_4bit-flat-M{m}": lambda dtype, m=m: ops.linear_4bit(X[:m, :FLAT_K].to(dtype), *FLAT_Q, N, None),
        f"linear_4bit_dgrad-M{m}": lambda dtype, m=m: ops.linear_4bit_dgrad(GRAD[:m].to(dtype), *Q, K),
        f"lora_linear_4bit-M{m}": lambda dtype, m=m: ops.lora_linear_4bit(
            X[:m].to(dtype), *Q, N, None, A, B, [0.5], [], None
        ),
    }
# Threads take parts of these in turn, of which the last is narrower.
MANY_X = normal(528, 64)
TALL, WIDE = (quantized_normal(shape, "nf4", 64, double_quant=True) for shape in ((1123, 64), (64, 1088)))
CALLS["linear_4bit-parts"] = lambda dtype: ops.linear_4bit(MANY_X.to(dtype), *TALL, 1123, None)
CALLS["linear_4bit_dgrad-parts"] = lambda dtype: ops.linear_4bit_dgrad(MANY_X.to(dtype), *WIDE, 1088)
CALLS["lora_linear_4bit-dropout"] = lambda dtype: ops.lora_linear_4bit(X.to(dtype), *Q, N, None, A, B, [0.5], *DROPOUT)
CALLS["lora_experts_4bit"] = lambda dtype: ops.lora_experts_4bit(
    X.to(dtype), *Q, ENDS, N // 4, False, [A[0].expand(4, 8, K)], [B[0].view(4, N // 4, 8)], [0.5]
)
CALLS["lora_experts_4bit_backward"] = lambda dtype: ops.lora_experts_4bit_backward(
    GRAD[:, : N // 4].to(dtype), X.to(dtype), XA.to(dtype), *Q, ENDS, False,
    [A[0].expand(4, 8, K)], [B[0].view(4, N // 4, 8)], [0.5], True, True, True,
)  # fmt: skip
CALLS["lora_backward"] = lambda dtype: ops.lora_linear_4bit_backward(
    GRAD.to(dtype), X.to(dtype), XA.to(dtype), *Q, A, B, [0.5], *DROPOUT, True, True, True
)
