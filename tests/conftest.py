"""What every test shares: a seed of its own, the number of threads, the CPU paths of this machine, and the skip of
`needs_cuda`."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

from qlora_ext import _C


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        return
    for item in items:
        if item.get_closest_marker("needs_cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Random inputs depend on the test alone, not on the tests before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def restored_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_C.cpu_paths())
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every CPU path that this machine has."""
    before = _C.cpu_path()
    _C.set_cpu_path(request.param)
    yield request.param
    _C.set_cpu_path(before)
