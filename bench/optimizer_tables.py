"""The tables of README.md on PagedAdamW."""

from __future__ import annotations

from cells import MIB, Row, Table, milliseconds


def optimizer_table(rows: list[Row]) -> Table:
    """A line for each case and optimizer; where malloc had huge pages and not, the slower of the two."""
    timed = [row for row in rows if "p50" in row]
    keys = ("layout", "elements", "tensors", "dtype", "provider")
    slowest = {tuple(row[key] for key in keys): row for row in sorted(timed, key=lambda row: float(row["p50"]))}
    table = [["AdamW, one step", "ms", "GB/s", "of limit", "states, MiB", "peer's time"]]
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in timed):
        row = slowest[case]
        layout = f"{row['elements'] / 1e6:.0f} M {row['dtype']}, {row['tensors']} tensors"
        peers = ", ".join(f"{ratio:.2g}x {name}" for name, ratio in row.get("speedup_over", {}).items())
        line = [f"{row['provider']}: {layout}", milliseconds(row), f"{row['gb_per_s']:.0f}", f"{row['of_limit']:.0%}"]
        table.append([*line, f"{row['state_bytes'] / MIB:.0f}", peers])
    return table


def curve_table(rows: list[Row]) -> Table:
    """A line for each share of the states that the budget holds."""
    head = ["states that fit", "ms", "of all resident", "raw I/O, ms", "of the larger", "of the sum", "waited, ms"]
    table = [[*head, "memory grew by, MiB (budget)"]]
    for row in (row for row in rows if "p50" in row):
        memory = ""
        if "rss_anon_growth_bytes" in row:
            memory = f"{row['rss_anon_growth_bytes'] / MIB:.1f} ({row['budget_bytes'] / MIB:.0f})"
        ratios = [f"{row['over_larger']:.2f}x", f"{row['over_sum']:.2f}x"] if row["raw_s"] else ["", ""]
        states = f"{row['bits']}-bit, {row['share']:.0%} of {row['state_bytes'] / MIB:.0f} MiB, others in {row['tier']}"
        line = [states, milliseconds(row), f"{row['over_resident']:.2f}x", f"{row['raw_s'] * 1e3:.3g}", *ratios]
        table.append([*line, f"{row['waited_s'] * 1e3:.3g}", memory])
    return table
