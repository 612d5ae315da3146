"""What the optimizers of bench_optimizer.py step on: parameters with gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from shapes import MODELS
from torch.nn import Parameter

LAYERS, R = 32, 16  # of Llama-7B; of its adapters


def sizes(layout: str, elements: int) -> list[int]:
    """Elements of each parameter: of one (flat), or of the LoRA adapters of all linear layers of Llama-7B (lora)."""
    if layout == "flat":
        return [elements]
    layer = [(n, k) for names, (n, k) in MODELS["Llama-7B"].items() for _ in names.split(", ")]
    return [R * width for n, k in layer for width in (k, n)] * LAYERS


def make_parameters(sizes: list[int], dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    """With gradients as in a training: of each a tenth is 0."""
    params = [Parameter(torch.randn(n, device=device).mul_(0.02).to(dtype)) for n in sizes]
    for p in params:
        grad = torch.randn(p.numel(), device=device).mul_(0.01)
        p.grad = grad.mul_(torch.rand_like(grad) > 0.1).to(dtype)
    return params


def finished(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The step with the wait for what it has given to the device."""
    if device.type != "cuda":
        return step

    def wait() -> None:
        step()
        torch.cuda.synchronize(device)

    return wait
