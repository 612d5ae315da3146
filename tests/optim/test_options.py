"""What PagedAdamW refuses of its options: of the whole optimizer, of a group, and of those that it loads."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import bits, parameters, set_gradients, state_bits, take_steps
from torch.nn import Parameter

from qlora_ext import _C, PagedAdamW

WHOLE = {
    "state_bits": 32,
    "page_bytes": 4096,
    "device_budget": None,
    "host_budget": None,
    "page_file": None,
    "stochastic_rounding": False,
    "seed": 0,
}
TWO = "betas: expected two numbers from 0 to below 1"
PAGE = "page_bytes: expected a multiple of 4096 from 4096 to 1073741824"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected 0 or more, got -1.0"),
        ({"lr": torch.ones(2)}, r"lr: expected a number, got tensor\(\[1., 1.\]\)"),
        ({"betas": (0.9, 1.0)}, rf"{TWO}, got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, rf"{TWO}, got \(0.9,\)"),
        ({"betas": (-0.1, 0.9)}, rf"{TWO}, got \(-0.1, 0.9\)"),
        ({"lr": 10**400}, "lr: expected a number, got 1000"),
        ({"weight_decay": -0.1}, "weight_decay: expected 0 or more, got -0.1"),
        ({"eps": float("nan")}, "eps: expected 0 or more, got nan"),
        ({"state_bits": 16}, "state_bits: expected 8 or 32, got 16"),
        ({"page_bytes": 0}, f"{PAGE}, got 0"),
        ({"page_bytes": 5000}, f"{PAGE}, got 5000"),
        ({"page_bytes": (1 << 30) + 4096}, f"{PAGE}, got 1073745920"),
        ({"host_budget": -1}, "host_budget: expected a number of bytes, 0 or more, or None, got -1"),
        ({"host_budget": 1 << 63}, "host_budget: expected a number of bytes"),
        ({"device_budget": 1 << 20}, "device_budget: expected None for states on the CPU"),
        ({"page_file": "a\0b"}, r"page_file: expected a path or None, got 'a\\x00b'"),
        ({"page_file": ""}, "page_file: expected a path or None, got ''"),
        ({"page_file": "a\ud800b"}, "page_file: expected a path or None"),
        ({"seed": -1}, "seed: expected an integer from 0 to .*, got -1"),
        ({"seed": 1 << 64}, "seed: expected an integer from 0"),
        ({"host_budget": 0}, "expected room for .* pages of 1048576 bytes, got room for 0"),
    ],
    ids=str,
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PagedAdamW: .*{message}"):
        PagedAdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": None}, "lr: expected a number, got None"),
        ({"lr": "0.1"}, "lr: expected a number, got '0.1'"),
        ({"eps": "x"}, "eps: expected a number, got 'x'"),
        ({"weight_decay": None}, "weight_decay: expected a number, got None"),
        ({"betas": 0.9}, f"{TWO}, got 0.9"),
        ({"betas": (None, 0.9)}, "betas: expected a number, got None"),
        ({"maximize": "False"}, "maximize: expected a bool, got 'False'"),
        ({"maximize": torch.ones(2)}, "maximize: expected a bool, got tensor"),
        ({"stochastic_rounding": "False"}, "stochastic_rounding: expected a bool, got 'False'"),
        ({"state_bits": 8.0}, "state_bits: expected 8 or 32, got 8.0"),
        ({"page_bytes": 4096.0}, f"{PAGE}, got 4096.0"),
        ({"host_budget": 1e9}, "host_budget: expected a number of bytes, 0 or more, or None, got 1000000000.0"),
        ({"device_budget": True}, "device_budget: expected a number of bytes, 0 or more, or None, got True"),
        ({"page_file": 0}, "page_file: expected a path or None, got 0"),
        ({"seed": None}, "seed: expected an integer from 0 to .*, got None"),
    ],
    ids=str,
)
def test_bad_types(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"PagedAdamW: {message}"):
        PagedAdamW(parameters(), **options)


def test_an_iterator_of_betas_would_be_used_up() -> None:
    with pytest.raises(TypeError, match=f"PagedAdamW: {TWO}, got <tuple_iterator"):
        PagedAdamW(parameters(), betas=iter((0.9, 0.99)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "betas",
    [np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), [np.float32(0.5), 0.25], [torch.tensor([0.5]), Fraction(1, 4)]],
    ids=str,
)
@pytest.mark.parametrize(
    "lr", [torch.tensor(0.25), torch.tensor([0.25]), Fraction(1, 4), np.longdouble(0.25)], ids=repr
)
def test_numbers_of_any_kind_are_saved(lr: Any, betas: Any, tmp_path: Path) -> None:
    optimizer = PagedAdamW(parameters(), lr=lr, eps=np.float16(0.5), betas=betas)
    optimizer.save_states(tmp_path / "states")
    other = PagedAdamW(parameters())
    other.load_states(tmp_path / "states")
    [group] = other.param_groups
    assert (group["lr"], group["eps"], group["betas"]) == (0.25, 0.5, (0.5, 0.25))


def test_limits_and_numbers_of_any_kind_are_taken() -> None:
    params, plain = parameters(), parameters()
    extremes = {"page_bytes": 1 << 30, "host_budget": (1 << 63) - 1, "seed": (1 << 64) - 1}
    optimizer = PagedAdamW(params, lr=torch.tensor(0.25), betas=[0, torch.tensor(0.5)], eps=1, **extremes)
    take_steps(params, optimizer, range(2))
    take_steps(plain, PagedAdamW(plain, lr=0.25, betas=np.array([0.0, 0.5]), eps=1.0, maximize=0), range(2))
    assert bits(params) == bits(plain)


@pytest.mark.parametrize("name", WHOLE)
def test_an_option_of_the_whole_optimizer_in_a_group(name: str) -> None:
    """Refused wherever it comes from; keys of others, as of schedulers, are let through."""
    optimizer = PagedAdamW([{"params": parameters(), "initial_lr": 1.0}])
    group = {"params": [Parameter(torch.ones(3))], name: WHOLE[name]}
    message = f"PagedAdamW: param_groups: expected options of a group, got '{name} of the whole optimizer'"
    with pytest.raises(ValueError, match=message):
        PagedAdamW([group])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.param_groups[0][name] = WHOLE[name]
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_weight_decay_that_is_not_decoupled(weight_decay: float) -> None:
    """A state_dict of torch.optim.Adam."""
    params, ours = parameters(), parameters()
    adam = torch.optim.Adam(params, weight_decay=weight_decay)
    take_steps(params, adam, range(2))
    optimizer = PagedAdamW(ours, weight_decay=0.25)
    if weight_decay:
        with pytest.raises(
            ValueError, match="PagedAdamW: decoupled_weight_decay: expected True, or weight_decay 0, got"
        ):
            optimizer.load_state_dict(adam.state_dict())
        assert optimizer.param_groups[0]["weight_decay"] == 0.25
        assert state_bits(optimizer) == {}
    else:
        optimizer.load_state_dict(adam.state_dict())
        assert state_bits(optimizer) == state_bits(adam)


def test_a_loaded_maximize_that_is_no_bool() -> None:
    optimizer = PagedAdamW(parameters())
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["maximize"] = "False"
    with pytest.raises(TypeError, match="maximize: expected a bool, got 'False'"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["maximize"] is False
    state_dict["param_groups"][0]["maximize"] = None
    optimizer.load_state_dict(state_dict)
    take_steps(optimizer.param_groups[0]["params"], optimizer, range(1))


def test_a_parameter_on_meta() -> None:
    layer = torch.nn.Linear(2, 3, device="meta")
    with pytest.raises(
        ValueError, match=r"params: expected parameters with values \(of a model on meta, after to_empty"
    ):
        PagedAdamW(layer.parameters())
    PagedAdamW(layer.to_empty(device="cpu").parameters())


def test_a_gradient_elsewhere_than_its_parameter() -> None:
    """torch refuses most; one that stayed behind when `.data` moved would be read at an address of the other device."""
    store = _C.PagedStates("cpu", 1 << 20, None, None, "")
    ids, p = store.add([64], [32]), torch.zeros(64)
    with pytest.raises(ValueError, match=r"^PagedAdamW: gradients: expected device cpu, got meta"):
        store.step(ids, [p], [p.to("meta")], [0], [(1e-3, 0.9, 0.999, 1e-8, 0.0, False)], None, False, 0)


def test_a_number_on_meta_is_none() -> None:
    with pytest.raises(ValueError, match="PagedAdamW: lr: expected a number"):
        PagedAdamW(parameters(), lr=torch.tensor(1.0, device="meta"))
