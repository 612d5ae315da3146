"""What PagedAdamW.state refuses of what programs put into it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from qlora_ext import PagedAdamW


def step_with(state: dict[str, Any]) -> None:
    p = Parameter(torch.ones(4))
    optimizer = PagedAdamW([p])
    optimizer.state[p] = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)} | state
    p.grad = torch.ones(4)
    optimizer.step()


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(4)


STEPS = {
    "two": torch.ones(2),
    "two of NumPy": np.ones(2),
    "on meta": torch.ones((), device="meta"),
    "too large": 10**400,
    "list": [1],
    "word": "x",
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_is_a_whole_number(step: Any) -> None:
    with pytest.raises(ValueError, match="step of parameter 0: expected a whole number"):
        step_with({"step": step})


@pytest.mark.parametrize("make", [lambda: torch.zeros(4).to_sparse(), fake], ids=["sparse", "fake"])
def test_moments_have_values_in_memory(make: Any) -> None:
    with pytest.raises(ValueError, match="exp_avg of parameter 0: expected floats"):
        step_with({"step": 1, "exp_avg": make()})
