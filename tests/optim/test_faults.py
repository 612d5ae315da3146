"""What goes wrong around PagedAdamW: files, disks, memory, forks, kills. Nothing is half done, nothing leaks."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import KIB, bits, paging, parameters, set_gradients, state_bits, take_steps, train
from torch.nn import Parameter
from torch.utils.data import DataLoader

from qlora_ext import PagedAdamW

LR = 1e-2
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc or tmpfs")
IN_FILE = {"page_bytes": 8 * KIB, "host_budget": 0}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=512k") != 0:
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield folder
    gc.collect()
    assert libc.umount2(os.fsencode(folder), 2) == 0


# --- the page file --------------------------------------------------------------------------------------------------


def test_full_disk_before_step_1(small_disk: Path) -> None:
    params = parameters()
    with pytest.raises(OSError, match=r"PagedAdamW: page_file .*reserve .*No space left on device") as raised:
        PagedAdamW([*params, Parameter(torch.ones(100_000))], page_file=small_disk / "pages", **IN_FILE)
    assert raised.value.errno == 28
    del raised
    gc.collect()
    assert list(small_disk.iterdir()) == []
    optimizer = PagedAdamW(params, lr=LR, page_file=small_disk / "pages", **IN_FILE)  # 400 KiB fit
    take_steps(params, optimizer, range(2))
    with pytest.raises(OSError, match="No space left"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(100_000))]})
    take_steps(params, optimizer, range(2, 4))
    assert bits(params) == bits(train(partial(PagedAdamW, lr=LR), 4)[0])


def test_full_disk_in_save_states(small_disk: Path, tmp_path: Path) -> None:
    params, optimizer = train(partial(PagedAdamW, lr=LR), 1)
    optimizer.save_states(path := small_disk / "states.safetensors")
    before = path.read_bytes()
    take_steps(params, optimizer, range(1, 2))
    with pytest.raises(OSError, match=r"No space left on device: '.*states\.safetensors'"):
        optimizer.save_states(path)
    assert path.read_bytes() == before
    assert list(small_disk.iterdir()) == [path]
    take_steps(params, optimizer, range(2, 3))
    assert bits(params) == bits(train(partial(PagedAdamW, lr=LR), 3)[0])


def test_deleted_page_file_goes_on(tmp_path: Path) -> None:
    params, optimizer = train(partial(PagedAdamW, lr=LR, page_file=tmp_path / "pages", **IN_FILE), 3)
    (tmp_path / "pages").unlink()
    take_steps(params, optimizer, range(3, 6))
    expected, whole = train(partial(PagedAdamW, lr=LR), 6)
    assert bits(params) == bits(expected)
    assert state_bits(optimizer) == state_bits(whole)


def test_truncated_page_file_raises_before_anything_is_updated(tmp_path: Path) -> None:
    params, optimizer = train(partial(PagedAdamW, lr=LR, page_file=tmp_path / "pages", **IN_FILE), 3)
    optimizer.save_states(tmp_path / "states")
    before = bits(params)
    os.truncate(tmp_path / "pages", 50_000)
    set_gradients(params, 3)
    for _ in range(2):
        with pytest.raises(OSError, match=r"PagedAdamW: page_file .*expected \d+ bytes, got \d+ .*truncated"):
            optimizer.step()
        assert bits(params) == before
    with pytest.raises(OSError, match="truncated"):
        optimizer.state_dict()
    optimizer.load_states(tmp_path / "states")  # a checkpoint makes it whole again
    optimizer.step()
    assert bits(params) == bits(train(partial(PagedAdamW, lr=LR), 4)[0])


def test_page_file_is_no_ones_but_ours(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match="expected a new file or one that an optimizer left behind"):
        PagedAdamW(parameters(), page_file=tmp_path / "model.safetensors", **IN_FILE)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
    first = PagedAdamW(parameters(), page_file=tmp_path / "pages", **IN_FILE)
    with pytest.raises(OSError, match="another optimizer pages to it"):
        PagedAdamW(parameters(), page_file=tmp_path / "pages", **IN_FILE)
    with pytest.raises(OSError, match="open: No such file or directory"):
        PagedAdamW(parameters(), page_file=tmp_path / "none" / "pages", **IN_FILE)
    del first
    assert not (tmp_path / "pages").exists()


# --- processes ------------------------------------------------------------------------------------------------------

SAVER = """
import sys, torch
from qlora_ext import PagedAdamW
p = torch.nn.Parameter(torch.zeros(3_000_000))
optimizer = PagedAdamW([p], lr=1e-2, page_bytes=65536)
value = 0
while True:
    value += 1
    optimizer.load_state_dict({"state": {0: {"step": float(value), "exp_avg": torch.full_like(p, value),
                               "exp_avg_sq": torch.full_like(p, value)}},
                               "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.save_states(sys.argv[1])
    print(value, flush=True)
"""


def test_a_kill_at_any_point_of_save_states_leaves_a_whole_file(tmp_path: Path) -> None:
    path, cut_short = tmp_path / "states.safetensors", 0
    beside = path.with_name(f"{path.name}.tmp")
    for trial in range(6):
        with subprocess.Popen([sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()  # one is saved
            while not beside.exists():  # the next is under way
                assert process.poll() is None
            time.sleep(0.003 * trial)
            process.send_signal(signal.SIGKILL)
        cut_short += beside.exists()
        p = Parameter(torch.zeros(3_000_000))
        optimizer = PagedAdamW([p])
        optimizer.load_states(path)
        entry = optimizer.state_dict()["state"][0]
        value = entry["step"].item()
        assert value >= 1
        assert entry["exp_avg"].eq(value).all()
        assert entry["exp_avg_sq"].eq(value).all()
        optimizer.save_states(path)  # what the kill left beside is no obstacle
    assert cut_short > 0


@pytest.mark.parametrize("options", [{}, {"page_file": None, "host_budget": 0, "page_bytes": 4096}], ids=str)
def test_ctrl_c_in_a_step_leaves_no_parameter_behind(options: dict[str, Any], tmp_path: Path) -> None:
    if "page_file" in options:
        options = options | {"page_file": tmp_path / "pages"}
    plain, transposed = Parameter(torch.ones(64, 64)), Parameter(torch.ones(64, 64).T[:, ::2])
    optimizer = PagedAdamW([plain, transposed], lr=LR, **options)
    for p in (plain, transposed):
        p.grad = torch.ones_like(p)
    step = optimizer._paged.step

    def interrupted(*arguments: Any) -> None:
        step(*arguments)
        raise KeyboardInterrupt

    optimizer._paged.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(transposed, plain[:, ::2])
    assert (transposed < 1).all()


def test_two_optimizers_and_workers_that_fork(tmp_path: Path) -> None:
    options = {"page_bytes": 8 * KIB, "host_budget": 64 * KIB}
    both = [train(partial(PagedAdamW, lr=LR, page_file=tmp_path / f"pages{i}", **options), 2) for i in range(2)]
    for step in range(2, 5):
        loader = DataLoader(torch.arange(8), num_workers=2, multiprocessing_context="fork")
        for _ in loader:
            pass
        for params, optimizer in both:
            take_steps(params, optimizer, [step])
    expected = bits(train(partial(PagedAdamW, lr=LR), 5)[0])
    assert [bits(params) for params, _ in both] == [expected] * 2


def test_a_fork_cannot_step_with_its_parents_file(tmp_path: Path) -> None:
    params, optimizer = train(partial(PagedAdamW, lr=LR, page_file=tmp_path / "pages", **IN_FILE), 2)
    before = bits(params)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            optimizer._paged.stats()
            with pytest.raises(RuntimeError, match="got a fork of it"):
                optimizer.step()
            code = 0 if bits(params) == before else 2
            del optimizer
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    take_steps(params, optimizer, range(2, 4))
    assert bits(params) == bits(train(partial(PagedAdamW, lr=LR), 4)[0])


@LINUX
def test_paging_starts_no_thread(tmp_path: Path) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    train(partial(PagedAdamW, lr=LR), 1)  # torch's own threads
    before = threads()
    train(partial(PagedAdamW, lr=LR, page_file=tmp_path / "pages", **IN_FILE), 1)
    assert threads() == before


# --- memory ---------------------------------------------------------------------------------------------------------


def test_1000_rounds_of_add_remove_and_step_leak_no_page(tmp_path: Path) -> None:
    params = parameters()
    optimizer = PagedAdamW(params, lr=LR, **paging("half", tmp_path))
    take_steps(params, optimizer, range(1))

    def pages() -> int:
        stats = optimizer.stats()
        return sum(stats["pages"].values()) + stats["unwritten_pages"]

    before = pages()
    for step in range(1000):
        extra = [Parameter(torch.ones(1 + 997 * step % 5000)) for _ in range(2)]
        optimizer.add_param_group({"params": extra})
        if step % 3:
            for p in extra:
                p.grad = torch.ones_like(p)
        optimizer.step()
        if step % 2:
            optimizer.remove_param_group(1)
        else:
            optimizer.param_groups.pop()
    optimizer.step()
    assert pages() == before
    assert len(optimizer._paged._states) == len(params)
    [file] = tmp_path.iterdir()
    assert file.stat().st_size < 1 << 20
    assert bits(params) == bits(train_on_one_gradient(1002))


def train_on_one_gradient(steps: int) -> list[Parameter]:
    params = parameters()
    optimizer = PagedAdamW(params, lr=LR)
    set_gradients(params, 0)
    for _ in range(steps):
        optimizer.step()
    return params


MEMORY = """
import sys, torch
from qlora_ext import PagedAdamW
def rss_anon():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
params = [torch.nn.Parameter(torch.randn(1 << 21)) for _ in range(8)]  # 64 MiB; their states: 128
for p in params:
    p.grad = torch.randn(1 << 21)
def make(budget, file):
    return PagedAdamW(params, page_bytes=int(sys.argv[3]), host_budget=budget, page_file=sys.argv[2] + file)
make(0, "warm").step()  # threads and their stacks, and what malloc keeps for the tables of as many pages
before = rss_anon()
optimizer = make(int(sys.argv[1]), "")
most = 0
for _ in range(4):
    optimizer.step()
    most = max(most, rss_anon())
optimizer.save_states(sys.argv[2] + "saved")
optimizer.load_states(sys.argv[2] + "saved")
optimizer.step()
print(max(most, rss_anon()) - before)
"""


@LINUX
@pytest.mark.parametrize("page_bytes", [1 << 16, 1 << 20, 1 << 21], ids=lambda b: f"pages of {b >> 10}KiB")
@pytest.mark.parametrize("budget", [0, 16 << 20, 100 << 20], ids=lambda b: f"{b >> 20}MiB")
def test_resident_memory_grows_by_the_budget(budget: int, page_bytes: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(budget), str(tmp_path / "pages"), str(page_bytes)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    interpreter = 0 if budget else 64 * KIB  # without a budget the two pages are there to the byte
    assert grown <= budget + 2 * page_bytes + interpreter
    assert grown >= budget / 2
