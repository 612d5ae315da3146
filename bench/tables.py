"""The tables of the results, each from the rows of one file in bench/results/."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from cells import MIB, Row, Table, milliseconds, ratio
from optimizer_tables import curve_table, optimizer_table


class Comparison(NamedTuple):
    """Our row of one case, and the fastest peer's, if one ran."""

    ours: Row
    peer: Row | None

    @property
    def ratio(self) -> float:
        """How many times our time the peer's is."""
        return float("inf") if self.peer is None else self.peer["p50"] / self.ours["p50"]


def comparisons(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], Comparison]:
    """The timed cases, each known by these keys of its rows.

    Where a case was measured with huge pages for malloc and without, the measurement in which we stand worse.
    """
    cases: dict[tuple[Any, ...], dict[Any, list[Row]]] = {}
    for row in rows:
        if "p50" in row:
            key = tuple(str(row.get(name)) for name in keys)
            cases.setdefault(key, {}).setdefault(row.get("huge_pages"), []).append(row)
    found = {}
    for key, measurements in cases.items():
        compared = [_comparison(same) for same in measurements.values() if any(map(is_the_op, same))]
        if compared:
            found[key] = min(compared, key=lambda comparison: comparison.ratio)
    return found


def is_ours(row: Row) -> bool:
    """Whether it is this library's: its op, or another way to the same result."""
    return str(row["provider"]).startswith("qlora_ext")


def is_the_op(row: Row) -> bool:
    """Whether it is the op that the bench is about."""
    return bool(row["provider"] == "qlora_ext")


def _comparison(same: list[Row]) -> Comparison:
    peers = [row for row in same if not is_ours(row)]
    return Comparison(next(filter(is_the_op, same)), min(peers, key=lambda row: row["p50"], default=None))


def compared_cells(comparison: Comparison | None) -> list[str]:
    """Our time, the best peer's and its name, the ratio of the two, our share of the limit."""
    if comparison is None:
        return [""] * 4
    ours, peer = comparison
    of_limit = f"{ours['of_limit']:.0%}" if "of_limit" in ours else ""
    if peer is None:
        return [milliseconds(ours), "none ran", "", of_limit]
    return [milliseconds(ours), f"{milliseconds(peer)} {peer['provider']}", ratio(comparison.ratio), of_limit]


def product_table(rows: list[Row]) -> Table:
    """A line for each shape and number of rows, cold and hot beside each other."""
    found = comparisons(rows, "dtype", "shape", "M", "mode")
    table = [["N x K, rows", *_heads("cold"), *_heads("hot")]]
    for dtype, shape, M in dict.fromkeys(key[:3] for key in found):
        cells = [cell for mode in ("cold", "hot") for cell in compared_cells(found.get((dtype, shape, M, mode)))]
        table.append([f"{_size(shape)} {dtype}, {M}", *cells])
    return table


def _heads(what: str) -> list[str]:
    return [f"{what}: ms", "best peer, ms", "ratio", "of limit"]


def _size(shape: str) -> str:
    return shape.strip("[]").replace(", ", " x ")


def lora_table(rows: list[Row]) -> Table:
    """A line for each shape and number of rows, cold: forward with its cost over linear_4bit alone, and backward."""
    found = comparisons((row for row in rows if row["mode"] == "cold"), "dtype", "shape", "M", "bench")
    table = [["N x K, rows", *_heads("forward"), "over linear_4bit", *_heads("backward")]]
    for dtype, shape, M in dict.fromkeys(key[:3] for key in found):
        forward = found.get((dtype, shape, M, "lora_linear_4bit forward"))
        over = f"{forward.ours['over_linear_4bit']:+.1%}" if forward and "over_linear_4bit" in forward.ours else ""
        backward = found.get((dtype, shape, M, "lora_linear_4bit backward"))
        table.append([f"{_size(shape)} {dtype}, {M}", *compared_cells(forward), over, *compared_cells(backward)])
    return table


def format_table(rows: list[Row]) -> Table:
    """A line for each op, shape, dtype and mode of quantizing or decoding a weight."""
    found = comparisons(rows, "bench", "shape", "dtype", "double_quant", "mode")
    table = [["", *_heads("qlora_ext")]]
    for (op, shape, dtype, double_quant, mode), comparison in found.items():
        name = f"{op}, {_size(shape)} {dtype}{', double quantization' if double_quant == 'True' else ''}"
        table.append([name + (", hot" if mode == "hot" else ""), *compared_cells(comparison)])
    return table


def error_table(rows: list[Row]) -> Table:
    """A line for each format: bits a weight and error at some blocksizes."""
    blocksizes = (64, 256, 1024, 4096)
    table = [["bits a weight: RMS error at blocksize", *map(str, blocksizes)]]
    for kind, double_quant in dict.fromkeys((row["quant_type"], row["double_quant"]) for row in rows):
        same = {
            row["blocksize"]: row for row in rows if (row["quant_type"], row["double_quant"]) == (kind, double_quant)
        }
        cells = [f"{same[size]['bits']:.3f}: {same[size]['rms_error']:.2%}" for size in blocksizes]
        table.append([kind + (", double quantization" if double_quant else ""), *cells])
    return table


def methods_table(rows: list[Row]) -> Table:
    head = ["", *(row["method"] for row in rows)]
    lines: list[tuple[str, Callable[[Row], str]]] = [
        ("bits per weight of the base's linears", lambda r: f"{r['base_bits']:.3f}"),
        ("trainable parameters", lambda r: f"{r['trainable_parameters']:,} ({r['trainable_percent']:.2f} %)"),
        ("base, MiB", lambda r: f"{r['base_bytes'] / MIB:.1f}"),
        ("adapter + gradients + optimizer, MiB", lambda r: f"{training_bytes(r) / MIB:.1f}"),
        ("peak RSS of the process, MiB", lambda r: f"{r['peak_rss_bytes'] / MIB:.0f}"),
        ("tokens/s", lambda r: f"{r['tokens_per_second']:.0f}"),
        ("held-out loss before", lambda r: f"{r['held_out_loss_before']:.3f}"),
        ("held-out loss after", lambda r: f"{r['held_out_loss_after']:.3f}"),
    ]
    return [head, *([name, *(text(row) for row in rows)] for name, text in lines)]


def training_bytes(row: Row) -> int:
    return int(row["adapter_bytes"] + row["gradient_bytes"] + row["optimizer_bytes"])


def optimizers_table(rows: list[Row]) -> Table:
    """A line for each method of fine-tuning and optimizer."""
    head = ["", "steps", "states in memory, MiB", "states in a file, MiB", "peak RSS of the process, MiB", "tokens/s"]
    table = [[*head, "held-out loss"]]
    for row in rows:
        in_file = row["optimizer"]["file_bytes"]
        in_memory = row["optimizer_bytes"] - in_file + row["optimizer"]["ring_bytes"]
        line = [f"{row['method']}, {row['provider']}", str(row["step"])]
        line += [f"{in_memory / MIB:.1f}", f"{in_file / MIB:.1f}" if in_file else ""]
        line += [f"{row['peak_rss_bytes'] / MIB:.0f}", f"{row['tokens_per_second']:.0f}"]
        table.append([*line, f"{row['held_out_loss_after']:.4f}"])
    return table


def train_step_table(rows: list[Row]) -> Table:
    ours = rows[0]["tokens_per_s"]
    table = [[rows[0]["dtype"], "tokens/s", "first row / this row", "peak RSS of its process, MiB"]]
    for row in rows:
        peak = f"{row['peak_rss_bytes'] / MIB:.0f}" if "peak_rss_bytes" in row else "not measured"
        table.append([row["provider"], f"{row['tokens_per_s']:.0f}", f"{ours / row['tokens_per_s']:.2f}x", peak])
    return table


def train_step_profile_table(rows: list[Row]) -> Table:
    """A line a part of the step, a column a provider: milliseconds, and the share of the step."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cells = {(r["part"], r["provider"]): f"{r['p50'] * 1e3:.0f} ({r['share']:.0%})" for r in rows}
    parts = dict.fromkeys(row["part"] for row in rows)
    head = f"{rows[0]['dtype']}, ms of a step"
    return [[head, *providers], *([part, *(cells[part, one] for one in providers)] for part in parts)]


def generate_table(rows: list[Row]) -> Table:
    ours = rows[0]["tokens_per_s"]
    lines = [[r["provider"], f"{r['tokens_per_s']:.1f}", f"{ours / r['tokens_per_s']:.2f}x"] for r in rows]
    return [[rows[0]["dtype"], "tokens/s", "first row / this row"], *lines]


def script_table(rows: list[Row]) -> Table:
    """A line for what is measured of a model; each cell the rate, or the seconds, and how many times ours is faster."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cases = {(row["model"], row["measure"], row["provider"]): row for row in rows}
    table = [[rows[0]["dtype"], *providers]]
    for model, measure in dict.fromkeys(key[:2] for key in cases):
        unit = "s" if measure == "load" else "tokens/s"
        cells = []
        for provider in providers:
            row, ours = cases[model, measure, provider], cases[model, measure, "qlora_ext"]
            value = f"{row['p50']:.2f}" if measure == "load" else f"{row['tokens_per_s']:.3g}"
            cells.append(value if row is ours else f"{value} ({ratio(row['p50'] / ours['p50'])})")
        table.append([f"{model}: {measure}, {unit}", *cells])
    return table


def experts_table(rows: list[Row]) -> Table:
    """A line for each number of tokens; each cell our time, and theirs in terms of it. Then what the weights take."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    times = {(row["tokens"], row["direction"], row["provider"]): row for row in rows}
    table = [[f"{rows[0]['dtype']}, ms (times ours)", *providers]]
    for tokens, direction in dict.fromkeys(key[:2] for key in times):
        ours, *theirs = [times.get((tokens, direction, provider), {}) for provider in providers]
        cells = [f"{milliseconds(row)} ({ratio(row['p50'] / ours['p50'])})" if "p50" in row else "" for row in theirs]
        cells = ["raises" if "refused" in row else cell for row, cell in zip(theirs, cells, strict=True)]
        table.append([f"{direction}, {tokens} token{'s' * (tokens > 1)}", milliseconds(ours), *cells])
    held = {row["provider"]: f"{row['weight_bytes'] / MIB:.0f}" for row in rows if "p50" in row}
    return [*table, ["weights, MiB", *(held[provider] for provider in providers)]]


def sass_table(rows: list[Row]) -> Table:
    """A line a kernel: the worst of its instantiations; for a fused one, the loop of those for the fewest rows."""
    machines = {row["arch"]: row["gpu_of_arch"] for row in rows}
    head = [f"nvcc {rows[0]['nvcc']}", f"registers, {' / '.join(machines)}", "CTAs per SM", "PRMT + LDS a weight"]
    table = [[*head, "instructions a weight", f"roofline, {' / '.join(machines.values())}"]]
    for kernel in dict.fromkeys(row["kernel"].split("<")[0] for row in rows):
        mine = [row for row in rows if row["kernel"].split("<")[0] == kernel]
        few = [row for row in mine if row.get("weights") and row["column_tiles"] == 1 and not row["small_blocks"]]
        every = [(row["every_step"], row["weights"]) for row in few]
        decode = max(((step["PRMT"] + step["LDS"]) / weights for step, weights in every), default=0)
        total = max((sum(step.values()) / weights for step, weights in every), default=0)
        each = [[row for row in mine if row["arch"] == arch] for arch in machines]
        each_few = [[row for row in few if row["arch"] == arch] for arch in machines]
        line = [f"`{kernel}`", " / ".join(str(max(row["registers"] for row in part)) for part in each)]
        line += [" / ".join(str(min(row["ctas_per_sm"] for row in part)) for part in each)]
        line += [f"{decode:.2f}", f"{total:.2f}"] if few else ["", ""]
        line += [" / ".join(f"{min(row['roofline'] for row in part):.1f}" for part in each_few) if few else ""]
        table.append(line)
    return table


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "script": script_table,
    "compare_methods": methods_table,
    "compare_optimizers": optimizers_table,
    "train_step": train_step_table,
    "train_step_dropout": train_step_table,
    "train_step_profile": train_step_profile_table,
    "generate": generate_table,
    "experts": experts_table,
    "linear_4bit": product_table,
    "linear_4bit_dgrad": product_table,
    "lora_linear_4bit": lora_table,
    "quantize_4bit": format_table,
    "dequantize_4bit": format_table,
    "quantization_error": error_table,
    "optimizer": optimizer_table,
    "optimizer_paging": curve_table,
    "sass": sass_table,
}
