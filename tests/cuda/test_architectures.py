"""Below sm_80 the fused kernels only trap, as the ops know (launch.h: kLeastFusedMajor), and all else is there."""

from __future__ import annotations

import re

import pytest
from library import CSRC
from ptx.compile import compile_cu

IS_NOT_THERE = "// begin inline asm trap; // end inline asm ret;"
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", f"-I{CSRC}", "-Werror=all-warnings")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CSRC / "cuda").glob("*.cu")))
def test_a_t4_has_the_kernels_that_are_not_fused(name: str) -> None:
    ptx = compile_cu(CSRC / "cuda" / f"{name}.cu", "sm_75", FLAGS)
    kernels = re.findall(r"^\.?[a-z]* *\.entry \w+\(.*?\)[^{]*\{\n(.*?)^\}", ptx, re.DOTALL | re.MULTILINE)
    assert kernels
    for body in kernels:
        assert (" ".join(body.split()) == IS_NOT_THERE) == name.startswith("linear_4bit")
    (least,) = re.findall(r"kLeastFusedMajor = (\d+);", (CSRC / "launch.h").read_text())
    (arch,) = re.findall(r"__CUDA_ARCH__ >= (\d+)\n", (CSRC / "cuda" / "ptx.cuh").read_text())
    assert int(arch) == 100 * int(least) > 750
