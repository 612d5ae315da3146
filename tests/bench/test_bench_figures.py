"""The figures of the benches and the tables of them, down to their last digit."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import cells
import limits
import lora_providers
import optimizer_paging
import optimizer_parameters
import optimizer_resident
import options
import raw_transfers
import record
import report
import shapes
import suite
import tables
import timing
import weight


def test_percentiles_of_all_calls() -> None:
    times = [100.0, *map(float, range(1, 11))]
    assert timing.percentiles(times) == {"p20": 3, "p50": 6, "p80": 9, "calls": 11}
    assert timing.percentiles([3.0, 1.0, 2.0]) == {"p20": 1, "p50": 2, "p80": 3, "calls": 3}


@pytest.mark.parametrize("model", shapes.MODELS)
def test_the_layers_of_a_model_fit_each_other(model: str) -> None:
    """Attention goes from the hidden size to it by heads, of which k and v may have fewer, and the MLP by a larger."""
    layers = {part: shape for parts, shape in shapes.MODELS[model].items() for part in parts.split(", ")}
    hidden = layers["q_proj"][1]
    assert layers["q_proj"] == layers["o_proj"] == (hidden, hidden)
    assert layers["k_proj"] == layers["v_proj"] == (min(layers["k_proj"]), hidden)
    assert layers["gate_proj"] == layers["up_proj"] == layers["down_proj"][::-1] == (max(layers["up_proj"]), hidden)


@pytest.mark.parametrize("name", ["0x64", "64x128x8"])
def test_what_is_no_shape_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected NxK"):
        shapes.select([name])


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


def test_a_machine_with_a_gpu_is_another_and_one_that_is_held_back() -> None:
    row = {"cpu": "c", "threads": 2, "cpu_path": "avx2", "settings": {}}
    assert record.machine(row) == "c, 2 threads, avx2"
    assert record.machine(row | {"gpu": "H100"}) == "c, 2 threads, avx2, H100"
    held = row | {"settings": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
    assert record.machine(held) == "c, 2 threads, avx2, oneDNN held to AVX2"


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


@pytest.mark.parametrize(("patience", "calls"), [(-1, 1), (60, timing.LEAST_CALLS)])
def test_a_call_that_takes_too_long_is_timed_once(patience: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others, here in no time, as often as a median needs."""
    monkeypatch.setattr(suite, "PATIENCE", patience)
    given: Any = SimpleNamespace(seconds=0, burst=0)
    run = suite.Run(given, cache_bytes=2**20)
    provider = suite.Provider("qlora_ext", lambda: None, lambda *_: lambda: None, weight_bytes=100)
    run._measure_case({"mode": "cold"}, suite.Case(None, lambda *_: 0.0, other_bytes=0), [(provider, [None] * 2)])
    (row,) = run.rows
    assert (row["calls"], row["copies"]) == (calls, 2)


@pytest.mark.parametrize(
    ("mode", "held", "providers", "copies"),
    [
        ("cold", 0, 1, 6),
        ("cold", 400, 1, 6),
        ("cold", 500, 1, 5),
        ("cold", 500, 2, 2),
        ("cold", 10**6, 1, 1),
        ("hot", 0, 1, 1),
    ],
    ids=str,
)
def test_no_more_copies_are_bound_than_memory_has_room_for(
    mode: str, held: int, providers: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "ROOM", 2500)
    given: Any = SimpleNamespace(seconds=0, burst=0)
    run = suite.Run(given, cache_bytes=2**20)
    case = suite.Case(None, lambda *_: 0.0, other_bytes=0, held_bytes=held)
    forms: list[tuple[suite.Provider, list[Any]]] = [
        (suite.Provider(f"p{i}", lambda: None, lambda *_: lambda: None, weight_bytes=100), [None] * 6)
        for i in range(providers)
    ]
    run._measure_case({"mode": mode}, case, forms)
    assert [row["copies"] for row in run.rows] == [copies] * providers


def test_backward_through_lora_holds_x_in_fp32_at_most() -> None:
    """And no result of the forward pass."""
    of = weight.Weight(64, 128, torch.bfloat16)
    case = lora_providers.backward_case(of, 8)
    assert case.held_bytes == 8 * 128 * 4
    ours = lora_providers.backward(of)[0]
    layer, results = ours.make(), []
    layer.register_forward_hook(lambda *args: results.append(weakref.ref(args[-1])))
    call = ours.bind(layer, case.inputs)
    assert [result() for result in results] == [None]
    assert [tuple(gradient.shape) for gradient in call()] == [(8, 128), (16, 128), (64, 16)]


@pytest.mark.parametrize(
    ("changes", "commit"), [("", "abc"), (" M csrc/codec.h\n", "abc+changes")], ids=["", "changes"]
)
def test_a_result_of_changed_sources_is_of_no_commit(
    changes: str, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(command: list[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(stdout="abc\n" if "rev-parse" in command else changes)

    monkeypatch.setattr(record.shutil, "which", lambda _: "git")
    monkeypatch.setattr(record.subprocess, "run", git)
    assert record._commit() == commit


def test_adapters_of_llama_7b_are_of_all_its_layers() -> None:
    """448 matrices of rank 16, with the 39,976,960 numbers that others count, too."""
    sizes = optimizer_parameters.sizes("lora", 0)
    assert (len(sizes), sum(sizes)) == (448, 39_976_960)


def test_a_folder_is_on_the_innermost_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a {tmp_path} tmpfs rw\nb / ext4 rw\nc {tmp_path}/other xfs rw\n")
    monkeypatch.setattr(raw_transfers, "MOUNTS", mounts)
    folders = tmp_path / "pages", tmp_path / "other" / "pages", Path("/")
    assert [raw_transfers.filesystem(folder) for folder in folders] == ["tmpfs", "xfs", "ext4"]


def test_forms_are_named_with_all_in_which_they_differ() -> None:
    case = {"provider": "qlora_ext", "p50": 0.001, "shape": [64, 128], "dtype": "bfloat16", "huge_pages": "off"}
    rows = [
        case | {"bench": "quantize_4bit", "double_quant": double_quant, "mode": mode}
        for double_quant, mode in ((True, "cold"), (True, "hot"), (False, "cold"))
    ]
    name = "quantize_4bit, 64 x 128 bfloat16"
    expected = [f"{name}, double quantization", f"{name}, double quantization, hot", name]
    assert [line[0] for line in tables.format_table(rows)[1:]] == expected


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


def test_optimizers_are_compared_with_those_of_as_many_bits() -> None:
    times = [("qlora_ext PagedAdamW, 32-bit", 32, 2.0), ("peer", 32, 4.0), ("qlora_ext PagedAdamW, 8-bit", 8, 1.0)]
    case: dict[str, Any] = {"offloaded": False, "moved_bytes": 8e9}
    rows = [case | {"provider": name, "bits": bits, "p50": seconds} for name, bits, seconds in times]
    optimizer_resident.compare(rows, [{"copy": 4e9}, {"copy": 8e9}])
    assert [row.get("speedup_over") for row in rows] == [{"peer": 2.0}, None, {}]
    assert [row.get("over_32_bit") for row in rows] == [1.0, None, 0.5]
    assert [row["limit_s"] for row in rows] == [1.0] * 3
    assert [(row["of_limit"], row["gb_per_s"]) for row in rows] == [(0.5, 4.0), (0.25, 2.0), (1.0, 8.0)]


def test_a_step_moves_parameters_and_states_twice_and_gradients_once() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(8))]
    row = {"state_bytes": 2**20, "elements": 8, "bits": 32}  # the last page holds more than is read
    assert optimizer_resident.moved_bytes(row, parameters) == 3 * 32 + 2 * 64


def test_the_times_of_a_curve_are_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {("step", 1.0): 2.0, ("step", 0.5): 6.0, ("move", 0.5): 3.0}
    monkeypatch.setattr(optimizer_paging, "interleaved", lambda calls, **_: {call: [seconds[call]] for call in calls})
    moved = iter([(0, 0, 0, 0.0)] * 2 + [(4, 8, 12, 2.0)] * 2)
    points: Any = [SimpleNamespace(share=share, step=None, moved=lambda: next(moved)) for share in (1.0, 0.5)]
    args: Any = SimpleNamespace(device=torch.device("cpu"), seconds=1, burst=1)
    whole, half = optimizer_paging.time_points(points, {0.5: lambda: None}, args)
    ratios = ("raw_s", "over_resident", "over_larger", "over_sum")
    assert [whole[name] for name in ratios] == [0, 1, 1, 1]
    assert [half[name] for name in ratios] == [3, 3, 2, 1.2]
    of_a_step = ("read_bytes", "written_bytes", "waited_s", "compute_s")
    assert [half[name] for name in of_a_step] == [2, 3, 0.5, 2]


def test_the_rate_is_of_what_was_moved_and_the_limit_of_the_least() -> None:
    row: dict[str, Any] = {"p50": 2.0, "least_bytes": 4e9, "moved_bytes": 8e9, "flops": 0, "copying": False}
    row |= {"mode": "cold", "dtype": "float32"}
    measured = {"read": 4e9, "fma_fp32": dict.fromkeys(("baseline", "avx2", "avx512"), 1e9), "dpbf16": 1e9}
    suite._compare_with_limits(row, [measured])
    assert (row["limit_s"], row["of_limit"], row["gb_per_s"]) == (1.0, 0.5, 4.0)


def test_methods_are_compared_in_mib() -> None:
    row = {"method": "qlora", "base_bits": 4.127, "trainable_parameters": 1000, "trainable_percent": 0.5}
    row |= {"base_bytes": 2**21, "adapter_bytes": 2**20, "gradient_bytes": 2**20, "optimizer_bytes": 2**21}
    row |= {"peak_rss_bytes": 2**30, "tokens_per_second": 5.0, "held_out_loss_before": 3.0, "held_out_loss_after": 2.0}
    cells = [line[1] for line in tables.methods_table([row])]
    assert cells == ["qlora", "4.127", "1,000 (0.50 %)", "2.0", "4.0", "1024", "5", "3.000", "2.000"]


def test_a_part_of_a_step_is_in_milliseconds_with_its_share() -> None:
    row = {"part": "forward", "provider": "ours", "dtype": "bf16", "p50": 0.25, "share": 0.5}
    assert tables.train_step_profile_table([row]) == [["bf16, ms of a step", "ours"], ["forward", "250 (50%)"]]


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
