"""Parameters, gradients and pagings that the tests of PagedAdamW share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from qlora_ext import PagedAdamW

# Under a block, odd, over several pages, a multiple of everything, empty, a scalar.
SHAPES = [(300, 41), (7,), (1000, 30), (4096,), (64, 64), (0,), ()]

KIB = 1024
_NUMBERS = itertools.count()
# Named ways to page. The states of SHAPES take about 400 KiB.
PAGINGS: dict[str, dict[str, Any]] = {
    "resident": {},
    "small-pages": {"page_bytes": 4 * KIB},
    "half": {"page_bytes": 16 * KIB, "host_budget": 200 * KIB, "page_file": None},
    "all-in-file": {"page_bytes": 8 * KIB, "host_budget": 0, "page_file": None},
    "file-of-large-pages": {"page_bytes": 128 * KIB, "host_budget": 0, "page_file": None},
}

# States of three elements, as programs put them into an optimizer's `state`.
GIVEN = {"step": torch.tensor(7.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}


def paging(name: str, folder: Path) -> dict[str, Any]:
    """The options of PagedAdamW, with a new page file in the folder if there is to be one."""
    options = dict(PAGINGS[name])
    if "page_file" in options:
        options["page_file"] = folder / f"pages-{next(_NUMBERS)}"
    return options


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: Iterable[Tensor], step: int) -> None:
    """Gradients of very different sizes, which depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        scale = 10 ** torch.empty(p.shape).uniform_(-6, 0, generator=generator)
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def train(
    make: Callable[[list[Parameter]], Optimizer], steps: int, dtype: torch.dtype = torch.float32, first: int = 0
) -> tuple[list[Parameter], Optimizer]:
    """Parameters after this many steps, and their optimizer."""
    params = parameters(dtype)
    optimizer = make(params)
    take_steps(params, optimizer, range(first, first + steps))
    return params, optimizer


def take_steps(params: list[Parameter], optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def stepped(n: int = 3, **options: Any) -> tuple[Parameter, PagedAdamW]:
    """A parameter of ones after one step with a gradient of ones."""
    p = Parameter(torch.ones(n))
    p.grad = torch.ones(n)
    optimizer = PagedAdamW([p], lr=0.1, **options)
    optimizer.step()
    return p, optimizer


def as_torch(run: Callable[[Callable[..., Optimizer]], Any]) -> None:
    """What `run` gives with each optimizer is the same."""
    torch.manual_seed(0)
    got = run(PagedAdamW)
    torch.manual_seed(0)
    # Torch's fused kernel mistakes the order of strided parameters.
    torch.testing.assert_close(got, run(lambda *a, **k: AdamW(*a, foreach=False, **k)), rtol=1e-5, atol=1e-6)


def bits(params: Iterable[Tensor]) -> list[bytes]:
    """The bytes of tensors, to be compared exactly."""
    return [p.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for p in params]


def state_bits(optimizer: Optimizer) -> dict[tuple[int, str], bytes]:
    """The bytes of all states, with the steps."""
    state = optimizer.state_dict()["state"]
    return {(i, name): bits([value])[0] for i, entry in state.items() for name, value in entry.items()}
