"""Packages of models and texts, which `make test` installs and other users of the tests may not have."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def require_package(name: str) -> Path:
    """The folder of the package, or the test is skipped; where CI is true it fails instead."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    message = f"the package {name} is not installed"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)
