"""The names that an adapter may have, and what in its config is matched against those of layers."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Container, Mapping
from typing import TypeVar

from torch import nn

Number = TypeVar("Number", int, float)

LAST_PARTS = r"(.*\.)?({})"  # what a key of rank_pattern or alpha_pattern stands in


def is_pattern_of(key: str, name: str) -> bool:
    """Whether this key of rank_pattern or alpha_pattern means the layer of this name."""
    return _compiled(key).fullmatch(name) is not None


@functools.lru_cache(1 << 14)  # re's own cache keeps 512, and a file of EVA has a key for each layer
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(LAST_PARTS.format(key))


def by_pattern(pattern: Mapping[str, Number], name: str, default: Number) -> Number:
    """What this rank_pattern or alpha_pattern says of the layer of this name, or else the default."""
    return next((value for key, value in pattern.items() if is_pattern_of(key, name)), default)


def check_regex(what: str, pattern: object, within: str = "{}") -> None:
    """Raises TypeError or ValueError, which begins with `what`, if the pattern is no regular expression in a str.

    Args:
        within: the longer one that it is used in, where (?i) may not stand.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"{what}: expected a regular expression, got {pattern!r}")
    try:
        with warnings.catch_warnings():
            # Python 3.10 only warns of (?i) elsewhere than at the start, and then it holds for the whole.
            warnings.filterwarnings("error", "Flags not at the start", DeprecationWarning)
            re.compile(pattern)
            re.compile(within.format(pattern))
    except (re.error, DeprecationWarning, OverflowError, RecursionError) as error:
        raise ValueError(f"{what}: expected a regular expression, got {pattern!r} ({error})") from error


def check_name(op: str, name: str, taken: Container[str] = ()) -> None:
    """Raise TypeError or ValueError unless a new adapter can have this name."""
    if not isinstance(name, str):
        raise TypeError(f"{op}: name: expected a str, got {name!r}")
    if name in taken:
        expected = "a name that no adapter has yet (delete_adapter it first, or take another)"
        raise ValueError(f"{op}: name: expected {expected}, got {name!r}")
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        expected = "a new adapter name without dots that is no attribute of nn.ParameterDict"
        raise ValueError(f"{op}: name: expected {expected}, got {name!r}")
