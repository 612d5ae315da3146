"""What both fused products must show of how they work, whatever they compute."""

from __future__ import annotations

import re

import library
from ptx import Result


def assert_weight_is_read_once(result: Result) -> None:
    """Each packed byte and each 8-bit absmax from global memory exactly once, and hardly a sector twice."""
    packed, absmax = result.traffic["packed"].read, result.traffic["absmax"].read
    assert (packed.times == 1).all()
    assert (absmax.times == 1).all()
    sectors = packed.sectors + absmax.sectors
    compulsory = packed.compulsory_sectors + absmax.compulsory_sectors
    assert sectors <= 1.05 * compulsory, f"{sectors} sectors read, {compulsory} would do"


def assert_table_lookups_do_not_conflict(result: Result) -> None:
    """The pair table is read 4 bytes a lane; of all else only the dynamic codebook (floats) may make lanes wait."""
    lookups = [site for site in result.banks if re.match(r"ld\.shared\.[bu]32 ", site.instruction)]
    assert len(lookups) >= 16
    assert {site.degree for site in lookups} == {1}


def assert_partial_sums_are_fenced(kernel_name: str) -> None:
    """In the PTX of each kernel: partial sum, fence, arrival; and a fence between the arrival and the others' sums."""
    kernels = [library.load().kernel(name) for name in library.load().ptx if kernel_name in name]
    assert kernels
    for kernel in kernels:
        text = [instruction.text for instruction in kernel.instructions]
        arrivals = [i for i, line in enumerate(text) if re.match(r"(@\S+ )?atom\.", line)]
        assert arrivals, kernel.name
        for arrival in arrivals:
            before = [line for line in text[:arrival] if re.search(r"\b(st\.global|membar|fence)\b", line)]
            assert re.search(r"\b(membar\.gl|fence\.acq_rel\.gpu)\b", before[-1]), f"{kernel.name}: {before[-1]}"
            fence = max(i for i in range(arrival) if text[i] == before[-1])
            waits = [line for line in text[fence:arrival] if re.search(r"\b(bar|barrier)\.sync\b", line)]
            assert waits, f"{kernel.name}: one thread announces what others have not stored yet"
            after = [line for line in text[arrival:] if re.search(r"\b(ld\.global|membar|fence)\b", line)]
            assert re.search(r"\b(membar\.gl|fence\.acq_rel\.gpu)\b", after[0]), f"{kernel.name}: {after[0]}"
