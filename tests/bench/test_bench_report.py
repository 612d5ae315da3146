"""Which rows bench/results/ keeps, and which of them a document shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import record
import report


def test_a_machine_replaces_its_own_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    first, second = ({"cpu": cpu, "threads": 2, "cpu_path": "avx2", "p50": 1.0} for cpu in ("one", "two"))
    record.replace("op", [first])
    record.replace("op", [second])
    record.replace("op", [second | {"p50": 2.0}])
    assert record.by_machine(record.read("op")) == {
        "one, 2 threads, avx2": [first],
        "two, 2 threads, avx2": [second | {"p50": 2.0}],
    }
    record.replace("op", [second], every_machine=True)
    assert record.read("op") == [second]


@pytest.mark.parametrize("native", ["bf16", "fp32"])  # what is measured without --dtype
@pytest.mark.parametrize("best", report.PATHS)
def test_no_bench_replaces_the_rows_of_another(best: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NATIVE", native)
    runnable = list(report.PATHS[: report.PATHS.index(best) + 1])
    runs = report.benches(runnable)
    held_to = [run[run.index("--cpu-path") + 1] if "--cpu-path" in run else "" for run in runs]
    files = [(run[0], "--lora-dropout" in run) for run in runs]  # the training step has two
    assert len(set(zip(files, held_to, strict=True))) == len(runs)
    in_fp32 = runnable if native == "bf16" else runnable[:-1]
    assert [path for path in held_to if path] == [path for path in ("avx2", "avx512") if path in in_fp32]
    assert all((report.ROOT / script).exists() for script, *_ in [*runs, *report.TRAININGS, report.DEMO_DATA])
    scripts = {f"bench/{path.name}" for path in (report.ROOT / "bench").glob("bench_*.py")}
    assert scripts - {run[0] for run in runs} == {"bench/bench_cuda.py"}  # tools/gpu_suite.sh runs that


def test_readme_shows_the_last_run_on_the_path_that_does_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    known = {"threads": 2, "versions": {"torch": "2.15.0", "torchao": None}, "commit": "abc", "date": "2026-11-27"}
    known |= {"dtype": "bfloat16", "tokens_per_s": 1.0}
    for cpu, path in [("old", "amx"), ("new", "amx"), ("mid", "avx512_bf16"), ("small", "avx2"), ("any", "portable")]:
        record.replace("generate", [known | {"cpu": cpu, "cpu_path": path, "provider": cpu}])
    held = {"cpu": "new", "cpu_path": "amx", "provider": "held", "settings": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
    record.replace("generate", [known | held])
    shown = [
        [line.split()[1] for line in report.markdown("generate", document).splitlines() if line.endswith("| 1.00x |")]
        for document in (report.README, report.RESULTS)
    ]
    assert shown == [["new"], ["held", "any", "small", "mid", "new", "old"]]
    assert "; torch 2.15.0; commit abc, 2026-11-27<" in report.markdown("generate", report.README)


def test_a_stale_table_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    document = tmp_path / "RESULTS.md"
    document.write_text("a\n<!-- results: generate -->\n\n| stale |\n<!-- end -->\nb\n")
    made = "a\n<!-- results: generate -->\n\n(not measured yet)\n<!-- end -->\nb\n"
    assert report.filled(document) == made


@pytest.mark.parametrize("what", [[], ["--run"], ["--run", "trainings"]], ids=str)
def test_what_is_measured_is_measured_first_and_shown_everywhere(
    what: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["report.py", *what])
    monkeypatch.setattr(report._C, "cpu_paths", lambda: ["portable", "avx2", "avx512", "avx512_bf16"])
    monkeypatch.setattr(report._C, "cpu_path", lambda: "avx512")  # as QLORA_EXT_CPU may say, or Intel without tiles
    monkeypatch.setattr(report.subprocess, "run", lambda command, *, cwd, check: done.append((command[1:], check)))
    monkeypatch.setattr(report.plots, "draw", lambda name, rows: done.append(name))
    monkeypatch.setattr(report, "filled", lambda document: "new")
    documents = [tmp_path / name for name in ("README.md", "RESULTS.md")]
    for name, path in zip(("README", "RESULTS"), documents, strict=True):
        monkeypatch.setattr(report, name, path)
    report.main()
    measured = {0: [], 1: report.benches(["portable", "avx2", "avx512"]), 2: report.TRAININGS}[len(what)]
    commands = [report.DEMO_DATA, *measured] if what else []
    assert done[: len(commands)] == [(command, True) for command in commands]
    assert set(done[len(commands) :]) == {name for name in report.TABLES if record.read(name)}
    assert [path.read_text() for path in documents] == ["new", "new"]
