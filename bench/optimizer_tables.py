"""The tables of the results on PagedAdamW."""

from __future__ import annotations

from cells import MIB, Row, Table, milliseconds, ratio


def optimizer_table(rows: list[Row]) -> Table:
    """A line for each case and optimizer; where malloc had huge pages and not, the run in which we stand worse."""
    cases: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in (row for row in rows if "p50" in row):
        cases.setdefault((row["layout"], row["dtype"]), {}).setdefault(row["huge_pages"], []).append(row)
    table = [["AdamW, one step", "ms", "GB/s", "of limit", "states, MiB", "peer's time"]]
    for runs in cases.values():
        for row in min(runs.values(), key=_least_ratio):
            case = f"{row['provider']}: {row['elements'] / 1e6:.0f} M {row['dtype']}, {row['tensors']} tensors"
            peers = ", ".join(f"{ratio(value)} {name}" for name, value in row.get("speedup_over", {}).items())
            line = [case, milliseconds(row), f"{row['gb_per_s']:.0f}", f"{row['of_limit']:.0%}"]
            table.append([*line, f"{row['state_bytes'] / MIB:.0f}", peers])
    return table


def _least_ratio(rows: list[Row]) -> float:
    """How many times ours the time of the peer is that comes closest to us."""
    return min((value for row in rows for value in row.get("speedup_over", {}).values()), default=float("inf"))


def curve_table(rows: list[Row]) -> Table:
    """A line for each share of the states that the budget holds."""
    head = ["states that fit", "ms", "of all resident", "raw I/O, ms", "of the larger", "of the sum", "waited, ms"]
    table = [[*head, "memory grew by, MiB (budget)"]]
    for row in (row for row in rows if "p50" in row):
        memory = ""
        if "rss_anon_growth_bytes" in row:
            memory = f"{row['rss_anon_growth_bytes'] / MIB:.1f} ({row['budget_bytes'] / MIB:.0f})"
        ratios = [ratio(row["over_larger"]), ratio(row["over_sum"])] if row["raw_s"] else ["", ""]
        states = f"{row['bits']}-bit, {row['share']:.0%} of {row['state_bytes'] / MIB:.0f} MiB"
        states += f", others in {row['tier']}" if row["share"] < 1 else ""
        line = [states, milliseconds(row), ratio(row["over_resident"]), f"{row['raw_s'] * 1e3:.3g}", *ratios]
        table.append([*line, f"{row['waited_s'] * 1e3:.3g}", memory])
    return table
