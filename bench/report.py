"""Write the result tables of README.md from bench/results/; with --run, measure them all first.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. `--check` changes nothing and fails if one is stale.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parent.parent
MIB = 2**20
RUNS = (
    ["examples/demo_data.py", "--output", "build/demo"],
    ["bench/bench_quantize_4bit.py"],
    ["bench/bench_train_step.py", "--model", "build/demo/model.gguf"],
    ["bench/bench_generate.py"],
    ["bench/compare_methods.py"],
    ["bench/sass_report.py"],
)


def methods_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = ["", *(row["method"] for row in rows)]
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
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


def training_bytes(row: dict[str, Any]) -> int:
    return int(row["adapter_bytes"] + row["gradient_bytes"] + row["optimizer_bytes"])


def train_step_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    ours = rows[0]["tokens_per_s"]
    table = [["", "tokens/s", "qlora_ext is", "peak RSS of its process, MiB"]]
    for row in rows:
        peak = f"{row['peak_rss_bytes'] / MIB:.0f}" if "peak_rss_bytes" in row else "not measured"
        table.append([row["provider"], f"{row['tokens_per_s']:.0f}", f"{ours / row['tokens_per_s']:.2f}x", peak])
    return table


def train_step_profile_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line a part of the step, a column a provider: milliseconds, and the share of the step."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cells = {(r["part"], r["provider"]): f"{r['p50'] * 1e3:.0f} ({r['share']:.0%})" for r in rows}
    parts = dict.fromkeys(row["part"] for row in rows)
    return [["ms of a step", *providers], *([part, *(cells[part, one] for one in providers)] for part in parts)]


def generate_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    ours = rows[0]["tokens_per_s"]
    lines = [[r["provider"], f"{r['tokens_per_s']:.1f}", f"{ours / r['tokens_per_s']:.2f}x"] for r in rows]
    return [["", "tokens/s", "qlora_ext is"], *lines]


def quantize_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    table = [["", "qlora_ext, ms", "bitsandbytes, ms", "ratio"]]
    for ours in rows:
        if ours["provider"] != "qlora_ext":
            continue
        same = ("bench", "dtype", "double_quant")
        peer = next(r for r in rows if r["provider"] != "qlora_ext" and all(r[key] == ours[key] for key in same))
        name = f"{ours['bench']}, {ours['dtype']}{', double quantization' if ours['double_quant'] else ''}"
        times = [ours["p50"] * 1e3, peer["p50"] * 1e3]
        table.append([name, *(f"{t:.2f}" for t in times), f"{times[1] / times[0]:.0f}x"])
    return table


def sass_table(rows: list[dict[str, Any]]) -> list[list[str]]:
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


TABLES = {
    "compare_methods": methods_table,
    "train_step": train_step_table,
    "train_step_profile": train_step_profile_table,
    "generate": generate_table,
    "quantize_4bit": quantize_table,
    "sass": sass_table,
}


def markdown(name: str) -> str:
    """The table of one result, and the machine, versions and commit under it."""
    rows = record.read(name)
    if not rows:
        return "\n(not measured yet)\n"
    head, *body = TABLES[name](rows)
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]
    row = rows[0]
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items() if version)
    machine = f"{row['cpu']}, {row['threads']} threads, {row['cpu_path']}"
    where = f"{machine}; {versions}; commit {row['commit']}, {row['date']}"
    return "\n" + "\n".join(lines) + f"\n\n<sub>bench/results/{name}.jsonl: {where}</sub>\n"


def filled(text: str) -> str:
    """README's text with each table made anew."""
    pattern = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + markdown(match[2]) + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure everything first (about 15 minutes)")
    parser.add_argument("--check", action="store_true", help="only fail if a table is stale")
    args = parser.parse_args()
    if args.run:
        for command in RUNS:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    readme = ROOT / "README.md"
    text = readme.read_text()
    if args.check:
        sys.exit(0 if filled(text) == text else "README.md: its tables are stale; run bench/report.py")
    readme.write_text(filled(text))


if __name__ == "__main__":
    main()
