"""PagedAdamW.state, where the names of states in pages stand: what programs put into it and take out of it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import as_torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.two_tensor import TwoTensor

from qlora_ext import PagedAdamW

LR = 0.1
both = pytest.mark.parametrize("shape", [(5000,), (70, 90)], ids=str)


@both
def test_states_put_into_state_are_taken_over(shape: tuple[int, ...]) -> None:
    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.ones(shape))
        optimizer = make([p], lr=LR)
        optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape)}
        for _ in range(2):  # once, not at each step
            p.grad = torch.rand(shape)
            optimizer.step()
        return p.detach()

    as_torch(run)


RESETS: dict[str, Callable[[Any, Tensor], object]] = {
    "all": lambda optimizer, p: setattr(optimizer, "state", defaultdict(dict)),
    "emptied": lambda optimizer, p: optimizer.state[p].clear(),
    "an empty one": lambda optimizer, p: optimizer.state.update({p: {}}),
    "deleted": lambda optimizer, p: optimizer.state.pop(p),
}


@both
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
def test_states_taken_out_of_state_begin_anew(reset: Callable[..., object], shape: tuple[int, ...]) -> None:
    def run(make: Callable[..., Optimizer]) -> tuple[Tensor, Tensor]:
        p = Parameter(torch.ones(shape))
        optimizer = make([p], lr=LR)
        assert len(optimizer.state[p]) == 0  # which leaves an empty entry there
        for step in range(6):
            if step == 2:
                reset(optimizer, p)
            p.grad = torch.full(shape, float(step - 3))
            optimizer.step()
        return p.detach(), optimizer.state_dict()["state"][0]["step"]

    as_torch(run)


def test_what_others_keep_in_state_stays() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[p]["slow"] = slow = torch.ones(3)
    optimizer.state["global"] = {"k": 1}
    optimizer.state_dict()
    assert optimizer.state[p]["slow"] is slow
    saved = optimizer.state_dict()["state"]
    assert (saved[0]["step"], saved[0]["slow"], saved["global"]) == (2, slow, {"k": 1})
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))]})
    assert optimizer.state["global"] == {"k": 1}

    again = PagedAdamW([Parameter(torch.ones(3))])
    del saved[0]["step"], saved[0]["exp_avg"], saved[0]["exp_avg_sq"]
    again.load_state_dict(again.state_dict() | {"state": saved})
    assert again.state_dict()["state"] == saved


def test_states_put_in_that_do_not_lie_in_memory_as_they_are() -> None:
    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.ones(4, 30))
        optimizer = make([p], lr=LR)
        negated, of_graph = torch._neg_view(torch.full((4, 30), -2.0)), torch.rand(30, 4, requires_grad=True) * 3
        optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": negated, "exp_avg_sq": of_graph.t()}
        p.grad = torch.ones(4, 30)
        optimizer.step()
        return p.detach()

    as_torch(run)


def test_names_of_another_parameter_are_no_state() -> None:
    p, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    p.grad = other.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = other
    optimizer.state[other] = optimizer.state.pop(p)
    with pytest.raises(ValueError, match=r"state of parameter 0: expected tensors, .*, got the names of another"):
        optimizer.step()


@pytest.mark.parametrize("how", ["state", "update"])
def test_names_of_another_optimizer_are_no_state(how: str) -> None:
    p = Parameter(torch.ones(3))
    optimizer, other = PagedAdamW([p]), PagedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    if how == "state":
        other.state = optimizer.state
    else:
        other.state.update(optimizer.state)
    with pytest.raises(ValueError, match=r"state of parameter 0: expected tensors, .*, got the names of another"):
        other.step()


def test_states_put_in_with_another_size() -> None:
    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.ones(3))
        optimizer = make([p], lr=LR)
        p.grad = torch.ones(3)
        optimizer.step()
        p.data = torch.ones(5)
        optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": torch.rand(5), "exp_avg_sq": torch.rand(5)}
        p.grad = torch.ones(5)
        optimizer.step()
        return p.detach()

    as_torch(run)


def test_ctrl_c_before_a_first_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = PagedAdamW(params)
    optimizer.release()  # no parameter has pages
    for p in params:
        p.grad = torch.ones(3)
    names = optimizer._paged.names

    def interrupted(p: Tensor) -> Any:
        if p is params[2]:
            raise KeyboardInterrupt
        return names(p)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._paged, "names", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [1, 1, 1]


def test_a_state_without_steps_is_saved_as_none() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == {}


def test_a_loaded_state_without_steps_begins_anew() -> None:
    def run(make: Callable[..., Optimizer]) -> Tensor:
        p = Parameter(torch.ones(3))
        optimizer = make([p], lr=LR)
        state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: state}})
        p.grad = torch.ones(3)
        optimizer.step()
        return p.detach()

    as_torch(run)


@pytest.mark.parametrize(("size", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
def test_states_have_8_bits_from_4096_elements_on(size: int, dtype: torch.dtype) -> None:
    """The files of earlier versions have this border."""
    p = Parameter(torch.ones(size))
    optimizer = PagedAdamW([p], state_bits=8)
    p.grad = torch.ones(size)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == dtype


def test_bad_states_in_state_change_nothing() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    optimizer.state[p] = {"step": 1, "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(3)}
    p.grad = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"PagedAdamW.state: exp_avg of parameter 0: expected floats \[3\], got floats \[4\]"
    ):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_flattened_state_dicts_of_distributed_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    again = copy.deepcopy(model)
    optimizer, loaded = (PagedAdamW(m.parameters(), lr=LR) for m in (model, again))
    model(torch.randn(8, 4)).mean().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    set_optimizer_state_dict(again, loaded, flat, options=options)
    for got, expected in zip(*(o.state_dict()["state"].values() for o in (loaded, optimizer)), strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_empty_states_are_none() -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: {}}})
    assert optimizer.state_dict()["state"] == {}


WITHOUT_VALUES = {
    "zero tensor": lambda: torch._efficientzerotensor(3),
    "subclass": lambda: TwoTensor(torch.ones(3), torch.ones(3)),
    "meta": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("make", WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
def test_states_without_values_change_nothing(make: Callable[[], Tensor]) -> None:
    p = Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    bad = optimizer.state_dict()
    bad["state"][0]["exp_avg"] = make()
    with pytest.raises(ValueError, match=r"load_state_dict: exp_avg of parameter 0: expected floats \[3\], got floats"):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_what_others_keep_is_saved_and_loaded_as_torch_does() -> None:
    def run(make: Callable[..., Optimizer]) -> tuple[Any, Any, Any]:
        p, q = (Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
        optimizer, loaded = make([p], lr=LR), make([q], lr=LR)
        p.grad = q.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step()
        optimizer.state[p]["mine"] = torch.ones(4)
        optimizer.state["x"] = {"step": 3, "array": np.array([1, 2])}
        optimizer.state["y"] = {}
        optimizer.state["z"] = np.array([1, 2])
        loaded.load_state_dict(optimizer.state_dict())
        loaded.step()
        mine = loaded.state[q]["mine"]
        rest = {key: repr(entry) for key, entry in loaded.state.items() if isinstance(key, str)}
        return mine.dtype, mine is optimizer.state[p]["mine"], rest

    assert run(PagedAdamW) == run(torch.optim.AdamW)


def test_moved_names_can_be_moved_back() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = PagedAdamW([p])
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = q
    optimizer.state[q] = optimizer.state.pop(p)
    with pytest.raises(ValueError, match="got the names of another parameter's"):
        optimizer.step()
    optimizer.param_groups[0]["params"][0] = p
    optimizer.state[p] = optimizer.state.pop(q)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_an_entry_that_is_no_dict_is_named() -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(5)
    optimizer.state[p] = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="state of parameter 0: expected a dict, got NoneType"):
        optimizer.step()
    assert torch.equal(p, torch.ones(5))
