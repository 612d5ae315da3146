"""The masks of dropout_mask's kernel."""

from __future__ import annotations

import pytest
import reference
from launcher import Device, under_schedules
from reference import assert_same


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 255, 256, 4095, 4096, 4097, 10_000], ids=lambda n: f"n{n}")
def test_masks_are_those_of_the_reference(n: int) -> None:
    """The borders are those of a thread, of a block with a key of its own and of a CTA."""
    assert_same(Device().dropout_mask(n, 0.7, 7), reference.dropout_mask((n,), 0.7, 7))


@pytest.mark.parametrize("keep", [0.0, 2**-32, 0.5, 1 - 2**-32])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_every_seed_and_probability(seed: int, keep: float) -> None:
    assert_same(Device().dropout_mask(1000, keep, seed), reference.dropout_mask((1000,), keep, seed))


def test_a_hash_at_the_bound_is_dropped() -> None:
    [bound] = reference.dropout_hashes(1, 7).tolist()
    assert not Device().dropout_mask(1, bound / 2**32, 7).any()
    assert Device().dropout_mask(1, (bound + 1) / 2**32, 7).all()


def test_more_elements_than_32_bits_count() -> None:
    first = 2**36
    got = Device().dropout_mask(300, 0.5, 7, first)
    assert_same(got, reference.dropout_mask((300,), 0.5, 7, first))


def test_every_schedule_gives_the_same_mask() -> None:
    got = under_schedules(lambda device: device.dropout_mask(5000, 0.9, 7))
    assert_same(got, reference.dropout_mask((5000,), 0.9, 7))


def test_memory_traffic() -> None:
    """Each byte is written once, by whole sectors."""
    device = Device()
    device.dropout_mask(8192, 0.9, 7)
    [result] = device.results
    assert (result.traffic["kept"].written.times == 1).all()
    assert result.traffic["kept"].written.sectors == result.traffic["kept"].written.compulsory_sectors
