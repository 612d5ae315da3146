"""One thread at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


def in_turn(method: Method) -> Method:
    """For methods of an object: a thread waits until no other is in one of them."""

    @wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_turn_of", None) != os.getpid():  # or a fork, of a process in which a thread had its turn
            self._turn, self._turn_of = threading.RLock(), os.getpid()
        with self._turn:
            return method(self, *args, **kwargs)

    return cast("Method", alone)
