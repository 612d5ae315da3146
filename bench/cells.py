"""What a table of results consists of."""

from __future__ import annotations

from typing import Any

MIB = 2**20
Row = dict[str, Any]
Table = list[list[str]]


def milliseconds(row: Row) -> str:
    """The median, to three digits."""
    return f"{row['p50'] * 1e3:.3g}" if row["p50"] < 0.9995 else f"{row['p50'] * 1e3:.0f}"


def ratio(value: float) -> str:
    """To two decimals, where these say something."""
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
