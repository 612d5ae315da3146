"""What the other tests are worth: each mutant of the kernels makes one of them fail."""

from __future__ import annotations

from collections import Counter

import mutants
import pytest
from library import CSRC
from mutant_list import KINDS, MUTANTS, NOT_APPLICABLE, Mutant
from mutants import deletions, judge, kernels_with, mutated
from ptx import require_nvcc

SEEN_QUICKLY = [
    ("quantize_4bit.cu", "__syncthreads()"),
    ("quantize_4bit.cu", "byte & 0xf0u"),
    ("quantize_absmax.cu", "group < num_groups ?"),
    ("dequantize_4bit.cu", "kGroup == 1 ? 0 :"),
]


def identify(mutant: Mutant) -> str:
    return f"{mutant.file}-{mutant.kind}-{mutant.pattern}-{mutant.replacement}".replace("/", "|")


def check(mutant: Mutant) -> None:
    require_nvcc()
    verdict = judge(mutant)
    assert verdict.as_expected, verdict.text


@pytest.mark.parametrize("mutant", MUTANTS, ids=identify)
def test_pattern_occurs_once(mutant: Mutant) -> None:
    assert mutated(mutant) != (CSRC / "cuda" / mutant.file).read_text()


def test_every_kernel_has_three_mutants_of_each_kind() -> None:
    count = Counter(
        (kernel, mutant.kind) for mutant in MUTANTS if not mutant.equivalent for kernel in kernels_with(mutant.file)
    )
    for kernel in (path.stem for path in CSRC.glob("cuda/*.cu")):
        for kind in KINDS:
            wanted = 0 if (kernel, kind) in NOT_APPLICABLE else 3
            assert count[kernel, kind] >= wanted, f"{kernel}: {count[kernel, kind]} of {kind}"


@pytest.mark.parametrize("unseen_by", [[], ["linear_4bit"], ["linear_4bit", "linear_4bit_dgrad"]], ids=str)
@pytest.mark.parametrize("equivalent", ["", "it computes the same"], ids=["mutant", "equivalent"])
def test_all_tests_must_see_a_mutant_and_none_an_equivalent_one(
    equivalent: str, unseen_by: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "why_tests_fail", lambda kernel, _: None if kernel in unseen_by else "a test fails")
    [mutant] = [one for one in MUTANTS if (one.file, one.pattern) == ("split.cuh", "tiles % ctas != 0")]
    assert kernels_with(mutant.file) == ["linear_4bit", "linear_4bit_dgrad"]
    verdict = judge(mutant._replace(equivalent=equivalent))
    assert verdict.as_expected == (len(unseen_by) == (2 if equivalent else 0)), verdict.text


@pytest.mark.parametrize(("file", "pattern"), SEEN_QUICKLY)
def test_quick_ones_are_seen(file: str, pattern: str) -> None:
    [mutant] = [one for one in [*deletions(), *MUTANTS] if (one.file, one.pattern) == (file, pattern)]
    check(mutant)


def test_what_takes_too_much_cpu_time_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "SECONDS", 1)
    assert mutants.why_tests_fail("quantize_4bit", CSRC) == "quantize_4bit hangs"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [*deletions(), *MUTANTS], ids=identify)
def test_is_seen(mutant: Mutant) -> None:
    check(mutant)
