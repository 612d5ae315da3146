"""The names of a model's layers, by which adapters and their files refer to them: those of the plain model.

A model, or a part of it, may be wrapped in a module of torch.compile, of data parallelism and the like, which puts a
name of its own in between; and a module may stand for a weight (Experts4bit), whose name it then has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from qlora_ext.experts import Experts4bit

# What activation checkpointing and Lightning's Fabric (twice) call the module that they wrap.
_WRAPPED = {"_checkpoint_wrapped_module", "_forward_module", "_original_module"}


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made it, whose class takes seconds to import; fully_shard makes a subclass of that."""
    return any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__)


def is_wrapper(module: nn.Module) -> bool:
    """Whether names skip it: a wrapper (torch.compile, data parallelism, ...), or Experts4bit, which has its weight's
    name."""
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel, Experts4bit)
    within = module._modules.keys()
    return isinstance(module, kinds) or is_compiled(module) or (bool(within) and within <= _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The plain module inside all wrappers."""
    while is_wrapper(module):
        module = next(module.children())
    return module


def children(module: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Module]]:
    """(attribute, name, child) of each child of the module of this name. What is wrapped has its wrapper's name."""
    for key, child in module._modules.items():  # named_children names a shared child once
        if child is not None:
            own = child.replaced[0] if isinstance(child, Experts4bit) and child.replaced else key
            yield key, name if is_wrapper(module) else f"{name}.{own}" if name else own, child


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
    parts = name.split(".")
    return not {".".join(parts[i:]) for i in range(len(parts))}.isdisjoint(wanted)


def is_within(name: str, wanted: Iterable[str]) -> bool:
    """Whether it, or a module that it is in, is_named so."""
    return any(f".{full}." in f".{name}." for full in wanted)
