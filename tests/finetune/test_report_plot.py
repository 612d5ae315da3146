"""What is drawn in report.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sample_report import a_report

from qlora_ext.finetune import report as reporting


def drawn(report: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    figures = []

    class Kept(Figure):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr(reporting, "Figure", Kept)
    reporting.write(report, folder)
    return figures[0].axes


def test_losses_are_drawn_at_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve, _ = drawn(a_report(), tmp_path, monkeypatch)
    training, held_out = curve.lines
    assert training.get_xydata().tolist() == [[1, 3.5], [2, 2.5]]
    assert held_out.get_xydata().tolist() == [[0, 3.0], [1, 2.5], [2, 2.0]]


def test_memory_is_drawn_in_mib_with_what_is_in_a_file_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, memory = drawn(a_report(), tmp_path, monkeypatch)
    names = [label.get_text() for label in memory.get_yticklabels()]
    assert dict(zip(names, [bar.get_width() for bar in memory.patches], strict=True)) == {
        "base": 3,
        "adapter": 0.5,
        "gradients": 0.5,
        "optimizer": 1 - 0.75 + 0.0625,
        "optimizer, in a file": 0.75,
        "peak RSS": 7,
    }
