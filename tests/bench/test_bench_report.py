"""Which rows bench/results/ keeps, and which of them a document shows."""

from __future__ import annotations

import sys
from pathlib import Path

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


@pytest.mark.parametrize("best", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_no_bench_replaces_the_rows_of_another(best: str) -> None:
    paths = ["portable", "avx2", "avx512", "avx512_bf16"]
    runs = report.benches(paths[: paths.index(best) + 1])
    paths = [run[run.index("--cpu-path") + 1] if "--cpu-path" in run else best for run in runs]
    files = [(run[0], "--lora-dropout" in run) for run in runs]  # the training step has two
    assert len(set(zip(files, paths, strict=True))) == len(runs)
    assert all((report.ROOT / script).exists() for script, *_ in [*runs, *report.TRAININGS, report.DEMO_DATA])


def test_readme_shows_the_last_run_on_the_path_that_does_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    known = {"threads": 2, "versions": {"torch": "2.15.0"}, "commit": "abc", "date": "2026-11-27"}
    known |= {"dtype": "bfloat16", "tokens_per_s": 1.0}
    for cpu, path in [("old", "avx512_bf16"), ("new", "avx512_bf16"), ("small", "avx2")]:
        record.replace("generate", [known | {"cpu": cpu, "cpu_path": path, "provider": cpu}])
    shown = [
        [line.split()[1] for line in report.markdown("generate", document).splitlines() if line.endswith("| 1.00x |")]
        for document in (report.README, report.RESULTS)
    ]
    assert shown == [["new"], ["small", "new", "old"]]
