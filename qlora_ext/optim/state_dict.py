"""What torch and other programs keep in a state_dict, and in `optimizer.state`, beside PagedAdamW's states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from qlora_ext.optim.states import NAMES

# What groups of torch.optim.AdamW have beside its options here, which checkpoints of it are expected to have.
ADAMW_GROUP: dict[str, Any] = dict.fromkeys(("maximize", "amsgrad", "capturable", "differentiable"), False)
ADAMW_GROUP |= {"foreach": None, "fused": None, "decoupled_weight_decay": True}


class Held:
    """Carries a value through Optimizer.load_state_dict, which casts tensors to their parameter's dtype and device."""

    def __init__(self, value: Any) -> None:
        self.value = value


def held(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict with the parts of each parameter's state in a Held, if they are in none yet."""

    def hold(value: Any) -> Held:
        return value if isinstance(value, Held) else Held(value)

    state = {
        key: {name: hold(value) if name in NAMES else value for name, value in entry.items()}
        if isinstance(entry, dict)
        else hold(entry)
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


@contextmanager
def after_pre_hooks(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the hooks before load_state_dict make of this one; they may remove themselves. Within, they do nothing."""
    hooks, given = optimizer._optimizer_load_state_dict_pre_hooks, copy(state_dict)
    for hook in list(hooks.values()):
        replaced = hook(optimizer, given)
        given = given if replaced is None else replaced
    _check_is_optimizers(given)
    called = dict(hooks)
    hooks.update(dict.fromkeys(hooks, lambda *_: None))
    try:
        yield given
    finally:  # those that are registered still
        hooks.update({key: hook for key, hook in called.items() if key in hooks})


def _check_is_optimizers(given: Any) -> None:
    """Raise TypeError unless it is a state_dict of an optimizer by its form."""
    parts = {key: given.get(key) for key in ("state", "param_groups")} if isinstance(given, Mapping) else {}
    groups = parts.get("param_groups")
    are_groups = isinstance(groups, (list, tuple)) and all(isinstance(g, Mapping) and "params" in g for g in groups)
    if not are_groups or not isinstance(parts["state"], Mapping):
        expected = "that of an optimizer, with a dict as state and dicts with params as param_groups"
        got = ", ".join(f"{key} {str(value)[:40]}" for key, value in parts.items()) or type(given)
        raise TypeError(f"PagedAdamW.load_state_dict: state_dict: expected {expected}, got {got}")


def let_go(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What `held` has been given as the state."""

    def out(value: Any) -> Any:
        return value.value if isinstance(value, Held) else value

    return {
        key: {name: out(value) for name, value in entry.items()} if isinstance(entry, dict) else out(entry)
        for key, entry in state.items()
    }


def others_entries(entry: Any) -> Any:
    """What is in an entry of an optimizer's `state` beside the parts of a state: other programs keep it there."""
    return {name: value for name, value in entry.items() if name not in NAMES} if isinstance(entry, dict) else entry


def with_others_entries(
    entries: Mapping[Tensor, dict[str, Any]], state: Mapping[Any, Any]
) -> defaultdict[Any, dict[str, Any]]:
    """The entries of parameters, and what others keep in this `state`."""
    others = {key: others_entries(entry) if isinstance(key, Tensor) else entry for key, entry in state.items()}
    merged = {p: others.pop(p, {}) | entry for p, entry in entries.items()}
    return defaultdict(dict, merged | {key: e for key, e in others.items() if not isinstance(key, Tensor) or e})
