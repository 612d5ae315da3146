"""The names of a model's layers, by which adapters and their files mean them: those of the plain model.

A model, or a part of it, may be wrapped in torch.compile's module or in one of data parallelism, which put a name of
their own in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn


def is_wrapper(module: nn.Module) -> bool:
    """Whether it only runs its one child in another way, as torch.compile and data parallelism do."""
    # torch.compile's class takes seconds to import.
    return isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or "_orig_mod" in module._modules


def unwrapped(module: nn.Module) -> nn.Module:
    """The plain module inside all wrappers."""
    while is_wrapper(module):
        (module,) = module.children()
    return module


def children(module: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Module]]:
    """(attribute, name, child) below the module of this name, in the plain model: what is wrapped has its wrapper's."""
    for key, child in module._modules.items():  # named_children names a shared child once
        if child is not None:
            yield key, name if is_wrapper(module) else f"{name}.{key}" if name else key, child


def plain_modules(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """module.named_modules(), with the names in the plain model."""
    seen = set() if seen is None else seen
    if id(module) not in seen:
        seen.add(id(module))
        yield name, module
        for _, child_name, child in children(module, name):
            yield from plain_modules(child, child_name, seen)


def is_named(name: str, wanted: Iterable[str]) -> bool:
    """Whether it is one of these names, or ends with one after a dot."""
    return any(name == full or name.endswith("." + full) for full in wanted)


def is_pattern_of(key: str, name: str) -> bool:
    """Whether this key of rank_pattern or alpha_pattern means the layer of this name."""
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None
