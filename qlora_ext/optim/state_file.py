"""The states of PagedAdamW on disk: one safetensors file, with the hyperparameters in its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from qlora_ext.optim.checks import checked_hyper, parameters
from qlora_ext.optim.paged_parameters import PagedParameters
from qlora_ext.optim.safetensors_file import read_header, write_safetensors
from qlora_ext.optim.states import MOST_STEPS, Saved, state_forms
from qlora_ext.sharded import shard_number

_METADATA = "PagedAdamW"


def save_states(path: Path, groups: list[dict[str, Any]], paged: PagedParameters) -> None:
    """Write the states of the parameters of these groups, page by page. A tensor's name is its parameter's number and
    its part: "3.exp_avg"."""
    forms, steps, parts = {}, {}, []
    for index, p in enumerate(parameters(groups)):
        if taken := paged.steps(p):
            steps[index] = taken
            for part, form in state_forms(p, paged.state_bits).items():
                forms[f"{index}.{part}"] = form
                parts.append((p, part, f"{index}.{part}"))
    described = {
        "sizes": [len(group["params"]) for group in groups],
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        "steps": steps,
        "shards": _shards(groups),
    }
    try:
        text = json.dumps(described, default=_plain)
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"PagedAdamW.save_states: param_groups: expected what JSON has, got {error}") from error
    write_safetensors(
        path,
        forms,
        {"format": "pt", _METADATA: text},
        lambda file, offsets: paged.save([(p, part, offsets[name]) for p, part, name in parts], file),
    )


def _plain(given: Any) -> Any:
    """A number of any kind, or torch's and numpy's arrays of them, as JSON has it."""
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError):
        return given.tolist()


def _shards(groups: list[dict[str, Any]]) -> dict[int, int]:
    """The numbers of the parameters' shards that this process has, of those that are not the first."""
    params = parameters(groups)
    return {index: number for index, p in enumerate(params) if (number := shard_number(p))}


def find_states(
    file: BinaryIO, groups: list[dict[str, Any]], state_bits: int
) -> tuple[dict[Tensor, Saved], list[dict[str, Any]]]:
    """Where in the file the states of the parameters of these groups are, and the groups with its hyperparameters.

    Raises:
        ValueError: the file is not whole, or not for these groups and this state_bits.
    """
    at = f"PagedAdamW.load_states: {file.name}"
    metadata, forms, offsets = read_header(at, file)
    try:
        loaded, sizes, steps, shards = _read_metadata(metadata)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{at}: expected a file of save_states, got {error!r}") from error
    if shards is not None:
        _check_shards(at, shards, _shards(groups))
    expected = [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(f"{at}: expected groups of {expected} parameters, got {sizes}")
    for group, own in zip(loaded, groups, strict=True):
        group["params"] = own["params"]
        if "param_names" in own:
            group.setdefault("param_names", own["param_names"])
    saved = {}
    for index, p in enumerate(parameters(groups)):
        if index not in steps:
            continue
        parts: dict[str, Tensor | int] = {}
        for part, form in state_forms(p, state_bits).items():
            name = f"{index}.{part}"
            if forms.get(name) != form:
                raise ValueError(f"{at}: {name}: expected {form}, got {forms.get(name)}")
            parts[part] = offsets.pop(name)
        saved[p] = Saved(steps[index], parts)
    if offsets:
        raise ValueError(f"{at}: expected tensors of parameters that have taken steps alone, got {min(offsets)}")
    return saved, loaded


class _Described(NamedTuple):
    groups: list[dict[str, Any]]
    sizes: list[int]  # of the groups
    steps: dict[int, int]  # by parameter
    shards: dict[int, int] | None  # by parameter, if not the first; earlier versions did not write them


def _read_metadata(metadata: dict[str, str]) -> _Described:
    described = json.loads(metadata[_METADATA])
    groups = [group | {"betas": tuple(group["betas"])} for group in described["groups"]]
    for group in groups:
        checked_hyper(group)
    sizes, steps = described["sizes"], {int(index): taken for index, taken in described["steps"].items()}
    are_steps = all(type(taken) is int and 0 < taken < MOST_STEPS for taken in steps.values())
    if len(groups) != len(sizes) or not are_steps or not all(0 <= index < sum(sizes) for index in steps):
        raise ValueError(f"{len(groups)} groups for {sizes} parameters, steps {steps}")
    shards = described.get("shards")
    if shards is not None:
        shards = {int(index): number for index, number in shards.items()}
    return _Described(groups, sizes, steps, shards)


def _check_shards(at: str, shards: dict[int, int], here: dict[int, int]) -> None:
    for index in sorted(shards.keys() | here.keys()):  # names one: a model has hundreds
        if (got := shards.get(index, 0)) != (number := here.get(index, 0)):
            wanted = f"shard {number}, as this process has (each reads the file that it wrote)"
            raise ValueError(f"{at}: parameter {index}: expected {wanted}, got shard {got}")
