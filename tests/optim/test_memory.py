"""PagedAdamW when memory is short."""

from __future__ import annotations

import subprocess
import sys

import pytest

# 256 MiB of states, where 40 MiB can still be mapped, are as in torch no reason for accelerate to give up.
SHORT = """
import resource, torch
from accelerate.utils import find_executable_batch_size
from torch.nn import Parameter
from qlora_ext import PagedAdamW

def mapped():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))

p = Parameter(torch.ones(32 << 20))
p.grad = torch.ones_like(p)
other = Parameter(torch.ones(8))
other.grad = torch.ones(8)
PagedAdamW([other]).step()  # torch's threads
optimizer = PagedAdamW([p])
said = []

@find_executable_batch_size(starting_batch_size=8)
def train(batch_size):
    if batch_size == 8:
        resource.setrlimit(resource.RLIMIT_AS, (mapped() + (40 << 20), -1))
    try:
        optimizer.step()
    except RuntimeError as error:
        said.append(str(error))
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return batch_size

print(train(), bool((p == 1 - 1e-3 - 1e-5).all()), optimizer.state_dict()["state"][0]["step"].item(), *said)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="by /proc")
def test_a_step_without_memory_can_be_tried_again() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    batch_size, is_right, steps, said = done.stdout.split(maxsplit=3)
    assert (int(batch_size) < 8, is_right, steps) == (True, "True", "1.0")
    assert said.startswith("PagedAdamW: out of memory. Tried to allocate ")
