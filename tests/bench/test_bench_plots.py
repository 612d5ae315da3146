"""What the plots of the results show: each line, point by point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import plots

MACHINE = {"cpu_path": "avx2", "cpu": "one of no known generation"}


def drawn(name: str, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The only plot of these results."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.draw(name, rows)
    (figure,) = figures
    return figure


def lines(panel: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, by its label."""
    return {str(line.get_label()): [tuple(point) for point in line.get_xydata().tolist()] for line in panel.lines}


def test_a_panel_has_the_fastest_of_each_provider_and_the_limit_in_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    same = MACHINE | {"bench": "linear_4bit", "dtype": "bfloat16"}
    times = [("qlora_ext", 1, "cold", 4), ("qlora_ext", 1, "cold", 2), ("qlora_ext", 16, "cold", 8)]
    times += [("peer", 1, "cold", 6), ("qlora_ext", 1, "hot", 1)]
    rows = [
        same | {"provider": provider, "M": M, "mode": mode, "shape": [64, 128], "p50": ms / 1e3, "limit_s": ms / 2e3}
        for provider, M, mode, ms in times
    ]
    cold, hot = drawn("linear_4bit", [*rows, same | {"provider": "absent", "skipped": "why"}], monkeypatch).axes
    expected = {"qlora_ext": [(1, 2), (16, 8)], "peer": [(1, 6)], "the machine's limit": [(1, 1), (16, 4)]}
    assert lines(cold) == expected
    assert lines(hot) == {"qlora_ext": [(1, 1)], "the machine's limit": [(1, 0.5)]}
    assert [panel.get_title() for panel in (cold, hot)] == [f"64 x 128, bfloat16, {mode}" for mode in ("cold", "hot")]


def test_a_slowdown_is_beside_what_moves_or_compute_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    same = MACHINE | {"bits": 32, "tier": "file", "elements": 2**20, "p50": 1.0, "compute_s": 2.0}
    points = [(1, 0.0, 1.0), (0.5, 1.0, 1.25), (0, 6.0, 3.5)]
    rows = [same | {"share": share, "raw_s": raw, "over_resident": ratio} for share, raw, ratio in points]
    (panel,) = drawn("optimizer_paging", [*rows, MACHINE | {"bits": 8, "skipped": "it failed"}], monkeypatch).axes
    assert lines(panel) == {
        "32-bit, others in file": [(100, 1), (50, 1.25), (0, 3.5)],
        "32-bit, moves or compute alone": [(100, 1), (50, 1), (0, 3)],
    }


def test_errors_are_in_percent_over_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [(False, 64, 4.5, 0.09375), (False, 256, 4.125, 0.125), (True, 64, 4.25, 0.0625)]
    rows = [
        {"quant_type": "nf4", "double_quant": double_quant, "blocksize": size, "bits": bits, "rms_error": error}
        for double_quant, size, bits, error in forms
    ]
    (panel,) = drawn("quantization_error", rows, monkeypatch).axes
    expected = {"nf4": [(4.5, 9.375), (4.125, 12.5)], "nf4, double quantization": [(4.25, 6.25)]}
    assert lines(panel) == expected
    assert [text.get_text() for text in panel.texts] == ["64", "256"]


def test_a_plot_of_torch_held_back_has_a_name_of_its_own() -> None:
    row = {"cpu_path": "avx512", "cpu": "a CPU (family 6, model 207)", "bench": "linear_4bit", "dtype": "bfloat16"}
    rows = [row | {"p50": 1.0}]
    (free,) = plots.paths("linear_4bit", rows)
    (held,) = plots.paths("linear_4bit", [rows[0] | {"settings": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}])
    assert free.name == "linear_4bit-bfloat16-avx512-family6-model207.png"
    assert held.name == "linear_4bit-bfloat16-avx512-held-family6-model207.png"
