"""Write the result tables of README.md and the plots from bench/results/; with --run, measure them all first.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. `--check` changes nothing and fails if one is stale.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import plots
import record
from tables import TABLES

ROOT = Path(__file__).parent.parent
RUNS = (
    ["examples/demo_data.py", "--output", "build/demo"],
    ["bench/bench_linear_4bit.py", "--dtype", "bf16", "fp32"],
    ["bench/bench_linear_4bit_dgrad.py"],
    ["bench/bench_lora_linear_4bit.py", "--mode", "cold", "--rows", "1", "16", "128", "512", "2048"],
    ["bench/bench_quantize_4bit.py", "--dtype", "bf16", "fp32"],
    ["bench/bench_dequantize_4bit.py", "--dtype", "bf16", "fp32"],
    ["bench/quantization_error.py"],
    ["bench/bench_train_step.py", "--model", "build/demo/model.gguf"],
    ["bench/compare_methods.py"],
    ["bench/sass_report.py"],
)


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
    shown = "".join(f"\n![{path.stem}](bench/results/{path.name})\n" for path in plots.paths(name, rows))
    return "\n" + "\n".join(lines) + f"\n{shown}\n<sub>bench/results/{name}.jsonl: {where}</sub>\n"


def filled(text: str) -> str:
    """README's text with each table made anew."""
    pattern = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + markdown(match[2]) + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure everything first; each bench says what it is at")
    parser.add_argument("--check", action="store_true", help="only fail if a table is stale")
    args = parser.parse_args()
    if args.run:
        for command in RUNS:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    readme = ROOT / "README.md"
    text = readme.read_text()
    if args.check:
        sys.exit(0 if filled(text) == text else "README.md: its tables are stale; run bench/report.py")
    for name in TABLES:
        plots.draw(name, record.read(name))
    readme.write_text(filled(text))


if __name__ == "__main__":
    main()
