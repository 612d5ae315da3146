"""The codebooks of the extension, each derived a second time."""

from __future__ import annotations

from fractions import Fraction
from statistics import NormalDist

import bitsandbytes.functional
import pytest
import torch
from reference import assert_same, codebook

from qlora_ext import _C


def test_nf4_is_the_quantiles_of_the_normal_distribution() -> None:
    """8 positive and 7 negative quantiles, evenly spaced in probability, and 0.0; scaled to end at 1."""
    tail = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the outermost quantile lies half a step inside, mean of both sides' steps
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (tail - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (tail - 0.5) * i / 7) for i in range(7, 0, -1)]
    derived = [value / quantile(tail) for value in [*negative, 0.0, *positive]]
    assert _C.codebook("nf4") == pytest.approx(derived, rel=0, abs=2e-7)


def test_fp4_is_twelfths() -> None:
    """Sign, two exponent bits, one mantissa bit, but with 1/16 as its least positive value; all over 12."""
    magnitudes = [Fraction(n, 12) for n in (0, Fraction(1, 16), 8, 12, 4, 6, 2, 3)]
    derived = [float(value) for value in magnitudes + [-value for value in magnitudes]]
    assert_same(codebook("fp4"), torch.tensor(derived, dtype=torch.float32))


@pytest.mark.parametrize(("name", "signed"), [("dynamic", True), ("dynamic_unsigned", False)])
def test_dynamic_is_bitsandbytes_map(name: str, signed: bool) -> None:
    assert_same(codebook(name), bitsandbytes.functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("name", ["nf4", "dynamic", "dynamic_unsigned"])
def test_sorted_codebooks_rise_strictly_and_hold_zero(name: str) -> None:
    values = codebook(name)
    assert (values.diff() > 0).all()
    assert values[{"nf4": 7, "dynamic": 127, "dynamic_unsigned": 0}[name]] == 0.0


def test_unknown_codebook_is_an_error() -> None:
    with pytest.raises(ValueError, match="nf5"):
        _C.codebook("nf5")
