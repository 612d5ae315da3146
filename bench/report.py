"""Write the tables of RESULTS.md, of README.md and the plots from bench/results/; with --run, measure first.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`: in RESULTS.md one for every machine and CPU path,
in README.md a single one. `--check` changes nothing and fails if a table is stale.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import plots
import record
from options import NATIVE
from tables import TABLES

import qlora_ext._C as _C

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "RESULTS.md"
PATHS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # of the CPU, each with the instructions of those before
DEMO_DATA = ["examples/demo_data.py", "--output", "build/demo"]
MANY_ROWS = ["--rows", "16", "128", "512", "2048"]
# fp32 is measured on those up to the path in use, too, but on that one only where bf16 is what one computes in there.
VECTOR_PATHS = ("avx2", "avx512")
TRAININGS = (["bench/compare_methods.py"], ["bench/compare_optimizers.py"])


def benches(cpu_paths: list[str]) -> list[list[str]]:
    """Every bench but those that train: what `make bench` runs with these CPU paths, of which the last is in use."""
    linear, few = "bench/bench_linear_4bit.py", ["--shapes", "4096x4096", "--rows", "1", "4", "16", "128", "512"]
    fp32 = [path for path in cpu_paths if path in VECTOR_PATHS and (path != cpu_paths[-1] or NATIVE == "bf16")]
    return [
        *([linear, "--dtype", "fp32", "--cpu-path", path, *few] for path in fp32),
        [linear],
        ["bench/bench_linear_4bit_dgrad.py", "--rows", "4", *MANY_ROWS[1:]],
        ["bench/bench_lora_linear_4bit.py", "--mode", "cold", "--rows", "1", *MANY_ROWS[1:]],
        ["bench/bench_quantize_4bit.py", "--dtype", "bf16", "fp32"],
        ["bench/bench_dequantize_4bit.py", "--dtype", "bf16", "fp32"],
        ["bench/quantization_error.py"],
        ["bench/bench_train_step.py", "--model", "build/demo/model.gguf", "--compile"],
        ["bench/bench_train_step.py", "--model", "build/demo/model.gguf", "--compile", "--lora-dropout", "0.1"],
        ["bench/bench_generate.py"],
        ["bench/bench_script.py"],
        ["bench/bench_experts.py"],
        ["bench/bench_optimizer.py"],
        ["bench/sass_report.py"],
    ]


def markdown(name: str, document: Path) -> str:
    """The tables and plots of one result, with versions and commit: in RESULTS of each machine, the last first.

    In README of the machine measured last, of those whose CPU path does most, torch not held to fewer instructions.
    """
    machines = list(reversed(record.by_machine(record.read(name)).items()))
    if document == README:
        machines.sort(key=lambda each: (-PATHS.index(each[1][0]["cpu_path"]), record.held_to(each[1][0])))
        del machines[1:]
    parts = [_of_machine(name, machine, rows, document) for machine, rows in machines]
    return "\n".join(parts) or "\n(not measured yet)\n"


def _of_machine(name: str, machine: str, rows: list[dict[str, Any]], document: Path) -> str:
    head, *body = TABLES[name](rows)
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]
    versions = ", ".join(f"{package} {version}" for package, version in rows[0]["versions"].items() if version)
    where = f"{machine}; {versions}; commit {rows[0]['commit']}, {rows[0]['date']}"
    images = [path.relative_to(document.parent) for path in plots.paths(name, rows)]
    shown = "".join(f"\n![{image.stem}]({image})\n" for image in images)
    return "\n" + "\n".join(lines) + f"\n{shown}\n<sub>bench/results/{name}.jsonl: {where}</sub>\n"


def filled(document: Path) -> str:
    """The document's text with each table made anew."""
    pattern = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + markdown(match[2], document) + match[3], document.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measured = "first measure: everything but trainings, or those; each bench says what it is at"
    parser.add_argument("--run", nargs="?", const="benches", choices=["benches", "trainings"], help=measured)
    parser.add_argument("--check", action="store_true", help="only fail if a table is stale")
    args = parser.parse_args()
    if args.run:
        paths = _C.cpu_paths()
        in_use = paths[: paths.index(_C.cpu_path()) + 1]
        commands = benches(in_use) if args.run == "benches" else TRAININGS
        for command in (DEMO_DATA, *commands):
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if args.check:
        stale = [document.name for document in (README, RESULTS) if filled(document) != document.read_text()]
        sys.exit(f"{' and '.join(stale)}: stale tables; run bench/report.py" if stale else 0)
    for name in TABLES:
        for rows in record.by_machine(record.read(name)).values():
            plots.draw(name, rows)
    for document in (README, RESULTS):
        document.write_text(filled(document))


if __name__ == "__main__":
    main()
