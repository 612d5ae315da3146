"""bench/sass_report.py reads machine code rightly, and each of its assertions can fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ptx.compile import write_source

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import kernel_binaries
import machine_code
import record
import sass_report
import tables

ARCH = "sm_80"

# Two steps of decoding and two mma per iteration, as in the fused kernels, and one fault each.
SOURCE = """
#include "cuda/pair_table.cuh"
#include "cuda/ptx.cuh"

namespace qlora::cuda {
namespace {

enum Plant { kClean, kShuffle, kNarrowLoads, kLocal, kSpill, kConversion, kNoMma, kBranch, kLookups, kArithmetic };

template <int kPlant_>
struct Config {
  static constexpr int kPlant = kPlant_;
  static constexpr int kSharedBytes = kTableBytes + 512;
  static constexpr int kColumnTiles = 1;
  static constexpr bool kSmallBlocks = false;
  static constexpr int kCtasPerSm = kPlant == kSpill ? 16 : 2;
};

template <typename C>
__global__ void __launch_bounds__(128, C::kCtasPerSm)
    linear_4bit_kernel(const std::uint8_t* packed, const uint4* x, float4* y, int steps) {
  extern __shared__ __align__(16) char table[];
  const std::uint32_t lane4 = threadIdx.x % 32 * 4;
  const std::uint8_t* from = packed + threadIdx.x * 8;
  const uint4 b = x[threadIdx.x];
  float sum[4] = {}, other = 0.0f, many[64] = {};
  volatile unsigned local[16];
#pragma unroll 1
  for (int step = 0; step < steps; ++step, from += 1024) {
    uint2 w;
    if constexpr (C::kPlant == kNarrowLoads) {
      load_once(w.x, from, true);
      load_once(w.y, from + 512, true);
    } else {
      load_once(w, from, true);
    }
    if constexpr (C::kPlant == kShuffle) w.x = __shfl_xor_sync(~0u, w.x, 1);
    if constexpr (C::kPlant == kConversion) other += static_cast<float>(w.x);
    if constexpr (C::kPlant == kLocal) local[w.x % 16] = w.y, w.y += local[w.y % 16];
    if constexpr (C::kPlant == kSpill) {
#pragma unroll
      for (int i = 0; i < 64; ++i) many[i] = many[i] * many[(i + 1) % 64] + __uint_as_float(w.x + i);
    }
    const std::uint32_t upper[4] = {lookup_pair<0>(table, w.x, lane4), lookup_pair<1>(table, w.x, lane4),
                                    lookup_pair<2>(table, w.x, lane4), lookup_pair<3>(table, w.x, lane4)};
    const std::uint32_t lower[4] = {lookup_pair<0>(table, w.y, lane4), lookup_pair<1>(table, w.y, lane4),
                                    lookup_pair<2>(table, w.y, lane4), lookup_pair<3>(table, w.y, lane4)};
    if constexpr (C::kPlant == kLookups) {
      for (int i = 0; i < 4; ++i) other += __uint_as_float(lookup_pair<0>(table, upper[i], lane4));
    }
    if constexpr (C::kPlant == kArithmetic) {
      for (int i = 0; i < 8; ++i) other = fmaf(other, other, __uint_as_float(upper[i % 4] ^ lower[i % 3]));
    }
    if constexpr (C::kPlant == kNoMma) {
      for (int i = 0; i < 4; ++i) sum[i] += __uint_as_float(upper[i] ^ lower[i]);
    } else {
      mma_add<BFloat16>(sum, upper, b.x, b.y);
      if (C::kPlant != kBranch || __any_sync(~0u, w.x % 7 == 0)) mma_add<BFloat16>(sum, lower, b.z, b.w);
    }
  }
  for (int i = 0; i < 64; ++i) other += many[i];
  y[threadIdx.x] = {sum[0] + other, sum[1], sum[2], sum[3]};
}

"""
PLANTS = ("Clean", "Shuffle", "NarrowLoads", "Local", "Spill", "Conversion", "NoMma", "Branch", "Lookups", "Arithmetic")
END = "}  // namespace\n}  // namespace qlora::cuda\n"

# A loop of 9 instructions: 5 of every step, 3 behind a branch that BSYNC ends, and a jump out by CALL.
LOOP = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   LDG.E.NA.64.CONSTANT R2, [R2.64] ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0060*/                   LDS.128 R12, [R2+UR4] ;
        /*0070*/               @P1 CALL.REL.NOINC `(.L_x_2) ;
        /*0080*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """What is measured of each planted kernel."""
    try:
        kernel_binaries.find_tools()
    except FileNotFoundError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    arguments = "(const std::uint8_t*, const uint4*, float4*, int)"
    made = [f"template __global__ void linear_4bit_kernel<Config<k{plant}>>{arguments};" for plant in PLANTS]
    source = write_source("\n".join([SOURCE, *made, END]), "sass_plants")
    measured = sass_report.measure(source, ARCH, kernel_binaries.compile_kernels(source, ARCH))
    by_name = {row["kernel"]: row for row in measured}
    return {plant: by_name[f"linear_4bit_kernel<Config<{i}>>"] for i, plant in enumerate(PLANTS)}


def failures(row: dict[str, Any]) -> list[str]:
    return list(sass_report.failures([row], fused=()))


def test_reads_a_loop() -> None:
    (blocks,) = machine_code.parse(LOOP).values()
    loop = machine_code.hot_loop(blocks)
    assert loop is not None
    assert machine_code.count(loop.every) == {"HMMA": 1, "BRA": 2, "LDS": 1, "CALL": 1}
    assert machine_code.count(loop.sometimes) == {"LDG:8": 1, "NOP": 1, "BRA": 1}
    assert loop.longest == 8
    assert [instruction.bytes for instruction in loop.every if instruction.name == "LDS"] == [16]


def test_clean_kernel_is_within_budget(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["Clean"]
    assert failures(row) == []
    steps = row["weights"] // 16  # ptxas may unroll
    assert row["weights"] == 16 * steps > 0
    assert row["cta_threads"] == 128
    assert row["wanted_ctas"] == row["ctas_per_sm"] == 2  # of 64.5 KB each
    assert row["dynamic_shared"] == 256 * 256 + 512
    expected = {name: number * steps for name, number in {"HMMA": 2, "PRMT": 8, "LDS": 8, "LDG:8": 1}.items()}
    assert {name: row["every_step"][name] for name in expected} == expected
    assert row["sometimes"] == {}
    assert row["weights_per_clock"]["shared"] == 16 * 32 / 8


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        ("Shuffle", "expected no SHFL in the loop, got 1"),
        ("NarrowLoads", "expected global loads of 8 or 16 bytes, got 2 of 4"),
        ("Local", "expected no stack, got 64"),
        ("Local", "expected no LDL in the loop, got"),
        ("Local", "expected no local, got"),
        ("Spill", "expected no spill_stores, got"),
        ("Spill", "expected no spill_loads, got"),
        ("Conversion", "expected no I2F in the loop, got"),
        ("NoMma", "no loop with HMMA.16816"),
        ("Branch", "1 HMMA not in every step"),
        ("Lookups", "expected at most 1.15 PRMT + LDS a weight, got 1.5"),
        ("Arithmetic", "expected at most 1.7 instructions a weight, got 2."),
    ],
)
def test_planted_faults(rows: dict[str, dict[str, Any]], plant: str, expected: str) -> None:
    assert any(expected in failure for failure in failures(rows[plant])), failures(rows[plant])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cta_threads": 0}, "has no __launch_bounds__"),
        ({"registers": 255, "cta_threads": 512}, "512 threads of 255 registers"),
        ({"registers": 0}, "do not fit"),
        ({"ctas_per_sm": 0}, "do not fit"),
        (
            {"weights": 16, "every_step": {"HMMA": 2, "LDG:8": 0}},
            "expected 8 bytes of weights loaded in every step, got 0",
        ),
        ({"roofline": 0.97}, "cannot keep up with the memory of A100: 0.97 of it"),
    ],
)
def test_what_does_not_fit(rows: dict[str, dict[str, Any]], changed: dict[str, Any], expected: str) -> None:
    assert any(expected in failure for failure in failures(rows["Clean"] | changed))


def test_record_overwrites_nothing(rows: dict[str, dict[str, Any]]) -> None:
    assert not set(rows["Clean"]) & set(record.where())


def test_table_shows_the_worst(rows: dict[str, dict[str, Any]]) -> None:
    _, line = tables.sass_table([rows["Clean"], rows["Lookups"]])
    registers = max(rows[plant]["registers"] for plant in ("Clean", "Lookups"))
    assert line[:4] == ["`linear_4bit_kernel`", str(registers), "2", "1.50"]


def test_a_fused_kernel_is_missing(rows: dict[str, dict[str, Any]]) -> None:
    missing = list(sass_report.failures([rows["Clean"]]))
    assert missing == [f"linear_4bit_dgrad_kernel, {ARCH}: not there"]


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "expected"),
    [
        ("sm_80", 128, 256, 82944, 2),  # both bound by registers and by 164 KB
        ("sm_86", 128, 256, 82944, 1),
        ("sm_90", 32, 256, 0, 8),  # 2048 threads
        ("sm_89", 33, 512, 0, 3),  # 40 registers are given; 1536 threads
        ("sm_90", 65, 1024, 0, 0),  # 72 registers x 1024 threads are more than 64 K
        ("sm_80", 16, 32, 0, 32),
        ("sm_90", 32, 128, 227 * 1024, 1),
        ("sm_90", 32, 128, 227 * 1024 + 1, 0),
    ],
)
def test_ctas_per_sm(arch: str, registers: int, threads: int, shared: int, expected: int) -> None:
    row = {"arch": arch, "registers": registers, "cta_threads": threads, "static_shared": 0, "dynamic_shared": shared}
    assert sass_report.ctas_per_sm(row) == expected
