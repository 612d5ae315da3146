"""Bytes, sectors and bank conflicts, on accesses simple enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from . import Gpu, launch
from .kernel_sources import compile_kernels, constant


@pytest.fixture
def ptx() -> str:
    return compile_kernels("traffic")


@pytest.mark.parametrize("options", [{}, {"schedule": "warp"}, {"block_order": "random"}], ids=str)
def test_copy_touches_each_byte_once(ptx: str, options: dict[str, str]) -> None:
    x = np.arange(4 * 64 * 3, dtype=np.uint32)
    out = np.zeros_like(x)
    result = launch(ptx, "copy", 3, 64, [constant(x), out], **options)
    read, written = result.traffic["arg0"].read, result.traffic["arg1"].written
    for flow in (read, written):
        assert (flow.times == 1).all()
        assert flow.bytes == x.nbytes
        assert flow.sectors == flow.compulsory_sectors == x.nbytes // 32
    assert result.traffic["arg0"].written.sectors == result.traffic["arg1"].read.bytes == 0


@pytest.mark.parametrize("stride", [1, 2, 8, 33])
def test_strided_reads_cost_sectors(ptx: str, stride: int) -> None:
    x = np.zeros(32 * stride, np.float32)
    read = launch(ptx, "strided", 1, 32, [x, np.zeros(32, np.float32), stride]).traffic["arg0"].read
    assert read.bytes == 128
    assert read.sectors == read.compulsory_sectors == len({4 * stride * lane // 32 for lane in range(32)})
    assert np.flatnonzero(read.times).tolist() == [4 * stride * lane + i for lane in range(32) for i in range(4)]


def test_offset_pointer_costs_a_sector_a_warp(ptx: str) -> None:
    gpu = Gpu()
    x, out = gpu.array(np.zeros(128, np.float32), "x", offset=16), gpu.empty(128, np.float32, "out")
    traffic = launch(ptx, "strided", 1, 128, [x, out, 1], dev=gpu).traffic
    assert traffic["x"].read.sectors == 4 * 5
    assert traffic["x"].read.compulsory_sectors == 17
    assert traffic["out"].written.sectors == 16


def test_lanes_share_what_they_read_together(ptx: str) -> None:
    read = launch(ptx, "broadcast", 1, 32, [np.zeros(2, np.float32), np.zeros(32, np.float32)]).traffic["arg0"].read
    assert (read.bytes, read.sectors) == (8, 1)
    two_warps = (
        launch(ptx, "broadcast", 1, 64, [np.zeros(4, np.float32), np.zeros(64, np.float32)]).traffic["arg0"].read
    )
    assert (two_warps.bytes, two_warps.sectors, two_warps.compulsory_sectors) == (16, 2, 1)
    same = launch(ptx, "strided", 1, 64, [np.zeros(1, np.float32), np.zeros(64, np.float32), 0]).traffic["arg0"].read
    assert (same.times.tolist(), same.sectors, same.compulsory_sectors) == ([2] * 4, 2, 1)


def test_second_read_counts_again(ptx: str) -> None:
    read = launch(ptx, "twice", 1, 32, [np.zeros(32, np.float32), np.zeros(32, np.float32)]).traffic["arg0"].read
    assert (read.times == 2).all()
    assert (read.sectors, read.compulsory_sectors) == (8, 4)


def test_asynchronous_copy_counts_what_it_reads(ptx: str) -> None:
    x, out = np.arange(128, dtype=np.float32) + np.float32(0.1), np.zeros(128, np.float32)
    result = launch(ptx, "copy_async", 1, 32, [constant(x), out])
    expected = x.reshape(32, 4).copy()
    expected[16:, 1:] = 0
    assert np.array_equal(out, expected.ravel())
    read = result.traffic["arg0"].read
    assert read.bytes == 16 * 16 + 16 * 4
    assert read.sectors == 16
    assert read.times[: 16 * 16].all()
    assert read.times[16 * 16 :].reshape(16, 16).sum(axis=0).tolist() == [16] * 4 + [0] * 12


def test_atomics_are_counted(ptx: str) -> None:
    traffic = launch(ptx, "count", 2, 64, [np.zeros(4, np.uint32)]).traffic["arg0"]
    assert (traffic.atomics, traffic.read.sectors, traffic.written.sectors) == (128, 0, 0)


# element bytes, stride in elements -> the degree: distinct words in the worst bank of a phase
STRIDES = [
    (1, 1, 1),
    (1, 4, 1),
    (1, 128, 8),
    (4, 1, 1),
    (4, 2, 2),
    (4, 3, 1),
    (4, 32, 32),
    (4, 33, 1),
    (4, 0, 1),
    *((8, 1, 1), (8, 2, 2), (8, 16, 16), (8, 17, 1)),
    *((16, 1, 1), (16, 2, 2), (16, 8, 8), (16, 9, 1)),
]


@pytest.mark.parametrize(("size", "stride", "degree"), STRIDES)
def test_bank_conflicts_by_stride(ptx: str, size: int, stride: int, degree: int) -> None:
    name = {1: "unsigned char", 4: "float", 8: "float2", 16: "float4"}[size]
    result = launch(ptx, f"bank_stride<{name}>", 1, 32, [np.zeros((32, size), np.uint8), stride])
    loads = [site for site in result.banks if site.instruction.startswith("ld.shared")]
    phases = max(size // 4, 1)
    assert [(site.degree, site.requests, site.phases) for site in loads] == [(degree, 1, phases)]
    assert loads[0].cycles == degree * phases


@pytest.mark.parametrize(("pitch", "degree"), [(8, 1), (32, 4), (64, 8), (72, 1)])
def test_bank_conflicts_of_ldmatrix(ptx: str, pitch: int, degree: int) -> None:
    result = launch(ptx, "bank_ldmatrix", 1, 32, [np.zeros(32, np.uint32), pitch])
    [site] = [site for site in result.banks if site.instruction.startswith("ldmatrix")]
    assert (site.degree, site.phases, site.cycles) == (degree, 4, 4 * degree)


def test_report_names_conflicts_and_traffic(ptx: str) -> None:
    report = launch(ptx, "bank_stride<float>", 1, 32, [np.zeros(32, np.float32), 32]).report()
    assert "bank conflicts of 32: 32 cycles in 1 phases [ld.shared" in report
    assert "arg0: 128 bytes in 4 sectors written (4 distinct)" in report
