"""Plots of the results, as PNG beside them: times against rows or memory, with the limit, and error against bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Row = dict[str, Any]
Pages = dict[Path, Callable[[Path], None]]
OURS = "qlora_ext"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6d00", "#7f7f7f")  # told apart by all
MARKERS = "osv^D<>P"
PRODUCTS = ("linear_4bit", "linear_4bit_dgrad", "lora_linear_4bit")


def paths(name: str, rows: list[Row]) -> list[Path]:
    """The files that `draw` writes for these results."""
    return list(_pages(name, rows))


def draw(name: str, rows: list[Row]) -> None:
    """Write the plots of one result, if it has any."""
    for path, draw_page in _pages(name, rows).items():
        draw_page(path)


def _where(rows: list[Row]) -> str:
    """Of a file's name: the CPU path, "held" with oneDNN, and the CPU's family and model, as far as results tell."""
    generation = re.search(r"family (\d+), model (\d+)", rows[0]["cpu"])
    path = rows[0]["cpu_path"] + ("-held" if record.held_to(rows[0]) else "")
    return path + (f"-family{generation[1]}-model{generation[2]}" if generation else "")


def _pages(name: str, rows: list[Row]) -> Pages:
    if name == "quantization_error" and rows:
        return {record.RESULTS / f"{name}.png": partial(_draw_errors, rows)}
    if name == "optimizer_paging" and any("p50" in row for row in rows):
        path = record.RESULTS / f"{name}-{_where(rows)}.png"
        return {path: partial(_draw_slowdown, [row for row in rows if "p50" in row])}
    pages: Pages = {}
    if name in PRODUCTS:
        for bench, dtype in dict.fromkeys((row["bench"], row["dtype"]) for row in rows if "p50" in row):
            of_page = [row for row in rows if (row["bench"], row["dtype"]) == (bench, dtype) and "p50" in row]
            path = record.RESULTS / f"{bench.replace(' ', '_')}-{dtype}-{_where(rows)}.png"
            pages[path] = partial(_draw_rows, of_page)
    return pages


def _draw_rows(rows: list[Row], path: Path) -> None:
    """A panel for each shape and mode: a line for each provider, and what the limits leave."""
    panels = list(dict.fromkeys((tuple(row["shape"]), row["mode"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines + 1), squeeze=False)
    axes = list(grid.flat)
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    for (shape, mode), panel in zip(panels, axes, strict=False):
        same = [row for row in rows if (tuple(row["shape"]), row["mode"]) == (shape, mode)]
        _draw_panel(panel, same, providers)
        panel.set_title(f"{shape[0]} x {shape[1]}, {rows[0]['dtype']}, {mode}", fontsize=10)
    grid[0, 0].set_ylabel("ms a call")
    handles = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.suptitle(rows[0]["bench"])
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(4, len(handles)), fontsize=8)
    legend_height = (0.1 + 0.18 * -(-len(handles) // 4)) / figure.get_figheight()
    figure.tight_layout(rect=(0, legend_height, 1, 1))
    _save(figure, path)


def _draw_panel(panel: Axes, rows: list[Row], providers: list[str]) -> None:
    for i, provider in enumerate(providers):
        mine = [row for row in rows if row["provider"] == provider]
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        style |= {"linewidth": 2.5, "zorder": 3} if provider == OURS else {"linewidth": 1}
        if mine:
            panel.plot(*_fastest(mine, "p50"), label=provider, **style)
    limit = _fastest([row for row in rows if row["provider"] == OURS], "limit_s")
    panel.plot(*limit, color="black", linestyle="--", linewidth=1, label="the machine's limit")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_xlabel("rows of x")
    panel.grid(alpha=0.3)


def _fastest(rows: list[Row], what: str) -> tuple[list[int], list[float]]:
    """Numbers of rows and the least milliseconds at each: of measurements with huge pages for malloc and without."""
    numbers = sorted({row["M"] for row in rows})
    return numbers, [1e3 * min(row[what] for row in rows if row["M"] == M) for M in numbers]


def _draw_errors(rows: list[Row], path: Path) -> None:
    figure, panel = pyplot.subplots(figsize=(6.4, 4.4))
    kinds = dict.fromkeys((row["quant_type"], row["double_quant"]) for row in rows)
    for i, (quant_type, double_quant) in enumerate(kinds):
        same = [row for row in rows if (row["quant_type"], row["double_quant"]) == (quant_type, double_quant)]
        label = quant_type + (", double quantization" if double_quant else "")
        bits, errors = [row["bits"] for row in same], [100 * row["rms_error"] for row in same]
        panel.plot(bits, errors, label=label, color=COLORS[i], marker=MARKERS[i], markersize=4)
        if not double_quant:
            for row in same:
                at = (row["bits"], 100 * row["rms_error"])
                panel.annotate(str(row["blocksize"]), at, xytext=(3, 4), textcoords="offset points", fontsize=7)
    panel.set_xlabel("bits a weight (numbers: blocksize)")
    panel.set_ylabel("RMS error, % of the weights' RMS")
    panel.set_title("Normal weights in 4 bits", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def _draw_slowdown(rows: list[Row], path: Path) -> None:
    """A line for each width of states, and dashed what the moves and the compute, each by itself, leave."""
    figure, panel = pyplot.subplots(figsize=(6.4, 4.4))
    for i, (bits, tier) in enumerate(dict.fromkeys((row["bits"], row["tier"]) for row in rows)):
        same = [row for row in rows if (row["bits"], row["tier"]) == (bits, tier)]
        shares = [100 * row["share"] for row in same]
        least = [max(row["raw_s"], row["compute_s"]) / row["compute_s"] for row in same]
        style: dict[str, Any] = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4}
        panel.plot(shares, [row["over_resident"] for row in same], label=f"{bits}-bit, others in {tier}", **style)
        panel.plot(
            shares, least, label=f"{bits}-bit, moves or compute alone", color=COLORS[i], linestyle="--", linewidth=1
        )
    panel.set_xlabel("% of the states that fit the budget")
    panel.set_ylabel("time of a step: 1 is all resident")
    panel.set_title(f"PagedAdamW, {rows[0]['elements'] / 1e6:.0f} M parameters", fontsize=10)
    panel.set_xticks(shares)
    panel.invert_xaxis()
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """As PNG with a palette: a third of the size, and, without a date, the same bytes for the same results."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB").quantize(64).save(path)
    pyplot.close(figure)
