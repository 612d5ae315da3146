"""Which gradients a step of PagedAdamW takes: what a class of tensors or parameters says of itself counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

from qlora_ext import PagedAdamW


class WithOwnGradient(Parameter):
    """As programs have them that add gradients up in another dtype."""

    main_grad: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:
        return self.main_grad


class Half(Tensor):
    """Says that it has half of its elements."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size([super().shape[0] // 2])


class Wrapping(Tensor):
    """Could be one that wraps others, by what it has."""

    def __tensor_flatten__(self) -> Any:
        return [], None

    @staticmethod
    def __tensor_unflatten__(*_: Any) -> Tensor:
        raise NotImplementedError


class Dispatching(Tensor):
    """Its operations are those of a Tensor."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_a_gradient_that_a_class_of_parameters_gives() -> None:
    p, other = WithOwnGradient(torch.ones(4)), Parameter(torch.ones(4))
    Tensor.grad.__set__(p, torch.ones(4))  # type: ignore[attr-defined]
    optimizer = PagedAdamW([p, other])
    optimizer.step()
    assert torch.equal(p, torch.ones(4))
    p.main_grad = other.grad = -torch.ones(4)
    optimizer.step()
    assert torch.equal(p, other)
    assert (p > 1).all()


def test_a_parameter_that_says_another_shape() -> None:
    p = torch.ones(8).as_subclass(Half).requires_grad_()
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(8)
    with pytest.raises(ValueError, match=r"gradient of parameter 0: expected shape \[4\], got \[8\]"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "expected"), [(Half, r"shape \[8\], got \[4\]"), (Wrapping, "plain tensors or DTensors of them")]
)
def test_classes_of_gradients_that_are_refused(kind: type[Tensor], expected: str) -> None:
    first, p = Parameter(torch.ones(3)), Parameter(torch.ones(8))
    optimizer = PagedAdamW([first, p])
    first.grad, p.grad = torch.ones(3), torch.ones(8).as_subclass(kind)
    with pytest.raises((TypeError, ValueError), match=f"gradient of parameter 1: expected {expected}"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))


@pytest.mark.parametrize("kind", [Tensor, Dispatching])
def test_an_empty_parameter_may_be_expanded(kind: type[Tensor]) -> None:
    p = Parameter(torch.empty(0, 1).expand(0, 5))
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(0, 5).as_subclass(kind)
    optimizer.step()
    assert "step" in optimizer.state[p]


def test_a_gradient_of_a_parameter_without_values_changes_nothing() -> None:
    first, p = Parameter(torch.ones(3)), UninitializedParameter(requires_grad=False)
    optimizer = PagedAdamW([first, p])
    first.grad, p.grad = torch.ones(3), torch.ones(0)
    with pytest.raises(RuntimeError, match="shape of an uninitialized parameter"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_parameter_that_is_no_leaf_any_more_is_warned_of_in_python(capfd: pytest.CaptureFixture[str]) -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    p.requires_grad_(False).mul_(torch.ones(3, requires_grad=True))
    optimizer.step()
    assert "not a leaf" not in capfd.readouterr().err


def test_a_gradient_of_float64_is_refused() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    p.grad_dtype = None
    p.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match="gradient of parameter 0: expected dtype float32, float16 or bfloat16"):
        optimizer.step()
