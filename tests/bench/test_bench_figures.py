"""The figures of the benches and the tables of them, down to their last digit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import cells
import limits
import options
import record
import report
import shapes
import suite
import tables
import timing


def test_percentiles_of_all_calls() -> None:
    times = [100.0, *map(float, range(1, 11))]
    assert timing.percentiles(times) == {"p20": 3, "p50": 6, "p80": 9, "calls": 11}


def test_a_shape_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="expected NxK"):
        shapes.select(["0x64"])


@pytest.mark.parametrize(("given", "recorded"), [(["--smoke"], False), (["--no-record"], False), ([], True)], ids=str)
def test_results_are_recorded_but_those_of_a_try(
    given: list[str], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *given])
    assert options.parse(None, by_rows=True).record == recorded


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (0, 0)], ids=str)
def test_either_of_two_runs_may_fail(codes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    of_runs = iter(codes)

    def run(*command: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, next(of_runs), '{"a": 1}\n')

    monkeypatch.setattr(subprocess, "run", run)
    assert options.run_with_and_without_huge_pages() == ([{"a": 1}] * 2, any(codes))


def test_a_machine_with_a_gpu_is_another() -> None:
    row = {"cpu": "c", "threads": 2, "cpu_path": "avx2"}
    assert record.machine(row | {"gpu": "H100"}) == "c, 2 threads, avx2, H100" != record.machine(row)


def test_last_level_cache_is_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("32K", "1024K", "33792K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(limits, "CACHES", tmp_path)
    assert limits.last_level_cache() == 33792 * 1024


@pytest.mark.parametrize(("copying", "kept"), [(False, 100), (True, 150)])
def test_only_what_is_copied_counts_with_the_weights(copying: bool, kept: int) -> None:
    provider = suite.Provider("p", lambda: None, lambda *_: lambda: None, weight_bytes=100)
    case = suite.Case(None, lambda *_: 0.0, other_bytes=50, copying=copying)
    assert suite._kept_bytes(provider, case) == kept


def test_digits_of_milliseconds_and_ratios() -> None:
    assert [cells.milliseconds({"p50": seconds}) for seconds in (0.99949, 1.5)] == ["999", "1500"]
    assert [cells.ratio(value) for value in (2.345, 9.99, 12.3)] == ["2.35x", "9.99x", "12x"]


def test_a_peer_of_half_our_speed_is_twice_as_slow() -> None:
    rates = {"ours": 10.0, "peer": 5.0}
    rows = [{"provider": name, "dtype": "bf16", "tokens_per_s": rate} for name, rate in rates.items()]
    assert tables.train_step_table(rows)[2][2] == tables.generate_table(rows)[2][2] == "2.00x"


def test_experts_are_compared_by_their_times() -> None:
    case = {"dtype": "bf16", "tokens": 1, "direction": "forward", "weight_bytes": 2**20}
    rows = [case | {"provider": name, "p50": seconds} for name, seconds in (("ours", 0.001), ("peer", 0.004))]
    assert tables.experts_table(rows)[1] == ["forward, 1 token", "1", "4 (4.00x)"]


def test_training_takes_adapters_gradients_and_states() -> None:
    assert tables.training_bytes({"adapter_bytes": 1, "gradient_bytes": 2, "optimizer_bytes": 4}) == 7


def test_states_in_a_file_are_not_in_memory_but_their_ring() -> None:
    states = {"optimizer": {"file_bytes": 2**20, "ring_bytes": 2**22}, "optimizer_bytes": 2**21}
    row: dict[str, Any] = {"method": "qlora", "provider": "p", "step": 1, "peak_rss_bytes": 2**20, **states}
    row |= {"tokens_per_second": 1.0, "held_out_loss_after": 1.0}
    assert tables.optimizers_table([row])[1][2:4] == ["5.0", "1.0"]


@pytest.mark.parametrize("stale", [(), ("README.md",), ("RESULTS.md",)], ids=str)
def test_check_fails_if_either_document_is_stale(stale: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "filled", lambda document: document.read_text() + "x" * (document.name in stale))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert bool(ended.value.code) == bool(stale)
