"""The parts of the benches that decide something: what is timed, how long, with what it is compared, what is shown."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import bench_generate
import compare_optimizers
import exactness
import limits
import options
import plots
import record
import shapes
import smollm2
import suite
import tables
import timing
from transformers import GenerationConfig

import qlora_ext._C as _C
from qlora_ext.finetune.load import compute_dtype


def test_limits_of_this_machine() -> None:
    threads = torch.get_num_threads()
    measured = limits.measure(2**22, 2**20, seconds=0.01)
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    sets = {"baseline"} | {name for name, flag in (("avx2", "avx2"), ("avx512", "avx512f")) if flag in flags}
    assert set(measured) == {"threads", "read", "copy", "hot_read", "hot_copy", "fma_fp32", "dpbf16", "tdpbf16"}
    assert measured["threads"] == threads
    assert set(measured["fma_fp32"]) == sets
    assert (measured["dpbf16"] is not None) == ("avx512_bf16" in flags)
    assert (measured["tdpbf16"] is not None) == ("amx" in _C.cpu_paths())
    rates = [rate for rate in measured.values() if isinstance(rate, float)] + [*measured["fma_fp32"].values()]
    assert all(1e6 < rate < 1e15 for rate in rates)


@pytest.mark.parametrize(
    "arguments", [[], ["0", "4194304", "1048576", "1"], ["1", "4096", "1048576", "1"], ["1", "8192", "8", "1"]]
)
def test_limits_program_refuses(arguments: list[str]) -> None:
    done = subprocess.run([limits.build(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected" in done.stderr


MEASURED = [
    {
        "read": 50.0,
        "copy": 40.0,
        "hot_read": 200.0,
        "hot_copy": 100.0,
        "fma_fp32": {"avx2": 10.0, "avx512": 20.0},
        "dpbf16": 40.0,
        "tdpbf16": 400.0,
    },
    {
        "read": 80.0,
        "copy": 20.0,
        "hot_read": 100.0,
        "hot_copy": 50.0,
        "fma_fp32": {"avx2": 5.0, "avx512": 10.0},
        "dpbf16": 20.0,
        "tdpbf16": 500.0,
    },
]


@pytest.mark.parametrize(
    ("expected", "changed"),
    [
        (400 / 80, {}),  # the faster of the two measurements counts
        (400 / 40, {"copying": True}),
        (400 / 200, {"mode": "hot"}),
        (400 / 100, {"mode": "hot", "copying": True}),
        (4000 / 40, {"flops": 4000}),
        (4000 / 20, {"flops": 4000, "dtype": torch.float32}),
        (4000 / 500, {"flops": 4000, "cpu_path": "amx"}),
        (4000 / 20, {"flops": 4000, "cpu_path": "amx", "dtype": torch.float32}),
        (4000 / 20, {"flops": 4000, "cpu_path": "avx512"}),
        (4000 / 10, {"flops": 4000, "cpu_path": "avx2"}),
    ],
)
def test_least_seconds(expected: float, changed: dict[str, Any]) -> None:
    case: dict[str, Any] = {"moved_bytes": 400, "flops": 0, "copying": False, "mode": "cold", "dtype": torch.bfloat16}
    assert limits.least_seconds(MEASURED, **(case | {"cpu_path": "avx512_bf16"} | changed)) == expected


def test_shapes() -> None:
    assert shapes.select(["4096x4096", "Llama-7B", "8x64"]) == [(4096, 4096), (11008, 4096), (4096, 11008), (8, 64)]
    with pytest.raises(ValueError, match=r"expected NxK or one of SmolLM2-135M, .*, got '4096x'"):
        shapes.select(["4096x"])


def test_bursts_take_turns_and_their_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    took = {"quick": 1.0, "slow": 30.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: sum(took[name] for name in log))
    calls = {name: partial(log.append, name) for name in took}
    times = timing.interleaved(calls, seconds=30, burst=10, warmup=2)
    assert log[:3] == ["quick", "quick", "slow"]  # warm-up
    bursts = "".join(name[0] for name in log[3:]).replace("q" * 10, "Q")
    rounds = [bursts[i : i + 2] for i in range(0, 6, 2)]
    assert {*rounds} == {"Qs", "sQ"}  # in either order
    # The slow one has had its share after one burst, but a median is of five.
    assert bursts[6:] == "ss"
    assert times == {"quick": [1] * 27, "slow": [30] * 5}  # 9 of each burst of 10; alone in its burst, a call counts


def test_rotation_passes_the_cache() -> None:
    assert timing.cold_bytes(100, room=5_000, providers=4) == 400
    assert timing.cold_bytes(480, room=12_000, providers=8) == 1500
    assert timing.fits_hot(50, cache_bytes=100)
    assert not timing.fits_hot(51, cache_bytes=100)
    seen: list[int] = []
    call = timing.rotated([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--huge-pages", "on", "--cpu-path", "avx2"])
    chosen = options.parse(None, by_rows=True)
    assert (chosen.shapes, chosen.rows) == ([(4096, 4096), (14336, 4096)], list(shapes.ROWS))
    assert chosen.dtypes == [compute_dtype("auto", torch.device("cpu"))]  # as finetune computes here
    base = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0:glibc.malloc.arena_max=1", "HOME": "/"}
    env = options.environment(chosen, base)
    kept, *added = env.pop("GLIBC_TUNABLES").split(":")
    assert kept == "glibc.malloc.arena_max=1"
    assert dict(entry.split("=") for entry in added) == options.MALLOC
    assert env == {"HOME": "/", "QLORA_EXT_CPU": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert options.environment(chosen, options.environment(chosen, base)) == options.environment(chosen, base)
    monkeypatch.setattr(sys, "argv", ["bench", "--huge-pages", "off"])
    assert options.environment(options.parse(None, by_rows=False), {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}) == {}


def test_distances() -> None:
    exact, by_torch = torch.tensor([1.0, -2.0]).double(), torch.tensor([1.0, -2.25])
    assert exactness.of_bound(exact, by_torch, torch.tensor([1.5, -2.0])) == pytest.approx(1, rel=1e-6)
    assert exactness.of_bound(exact, by_torch, by_torch) == pytest.approx(0.5, rel=1e-6)
    assert exactness.differing(torch.tensor([1, 2, 3, 4]), torch.tensor([[1, 2], [3, 5]])) == 0.25
    assert exactness.distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    rows = exactness.checked_rows(2048)
    assert (rows[0], rows[-1], len(rows)) == (0, 2047, 64)
    assert exactness.checked_rows(3).tolist() == [0, 1, 2]


def row(provider: str, p50: float, **fields: Any) -> dict[str, Any]:
    case = {
        "bench": "linear_4bit",
        "shape": [64, 128],
        "dtype": "bfloat16",
        "M": 1,
        "mode": "cold",
        "huge_pages": "off",
    }
    return case | {"provider": provider, "p50": p50, "of_limit": 0.5, "limit_s": p50 / 2} | fields


ROWS = [
    row("qlora_ext", 0.001),
    row("qlora_ext dequantize_4bit + torch linear", 0.0001),  # not a peer
    row("slow", 0.004),
    row("quick", 0.003),
    row("qlora_ext", 0.001, huge_pages="on"),
    row("quick", 0.0015, huge_pages="on"),
    row("qlora_ext", 0.0005, mode="hot"),
    row("qlora_ext", 2, M=16),
    row("quick", 1, M=16),
    {"bench": "linear_4bit", "provider": "absent", "skipped": "it is not installed", "dtype": "bfloat16"},
]


def test_table_shows_the_best_peer_and_the_worse_of_two_measurements() -> None:
    head, *lines = tables.product_table(ROWS)
    assert lines == [
        ["64 x 128 bfloat16, 1", "1", "1.5 quick", "1.50x", "50%", "0.5", "none ran", "", "50%"],
        ["64 x 128 bfloat16, 16", "2000", "1000 quick", "0.50x", "50%", "", "", "", ""],
    ]
    assert all(len(line) == len(head) for line in lines)


def test_lora_table() -> None:
    both = [row("qlora_ext", 0.001, bench=f"lora_linear_4bit {way}") for way in ("forward", "backward")]
    both[0]["over_linear_4bit"] = 0.055
    head, line = tables.lora_table([*both, row("PEFT", 0.002, bench="lora_linear_4bit backward")])
    assert len(line) == len(head)
    assert line[5] == "+5.5%"
    assert line[6:9] == ["1", "2 PEFT", "2.00x"]


def point(share: float, p50: float, raw_s: float) -> dict[str, Any]:
    """A point of a slowdown curve whose compute takes 10 ms."""
    return {
        "bits": 32,
        "tier": "file",
        "share": share,
        "elements": 2**25,
        "state_bytes": 2**28,
        "budget_bytes": int(share * 2**28),
        "rss_anon_growth_bytes": 2**20,
        "p50": p50,
        "raw_s": raw_s,
        "compute_s": 0.01,
        "waited_s": 0.001,
        "over_resident": p50 / 0.01,
        "over_larger": p50 / max(raw_s, 0.01),
        "over_sum": p50 / (raw_s + 0.01),
        "cpu_path": "avx2",
        "cpu": "one of no known generation",
    }


CURVE = [point(1, 0.01, 0), point(0.5, 0.02, 0.018), {"bits": 8, "skipped": "it failed", "cpu_path": "avx2"}]


def test_curve_table() -> None:
    head, *lines = tables.curve_table(CURVE)
    resident, half = (dict(zip(head, line, strict=True)) for line in lines)
    assert resident["states that fit"] == "32-bit, 100% of 256 MiB"
    assert (resident["of all resident"], resident["of the larger"]) == ("1.00x", "")
    shown = ["ms", "raw I/O, ms", "of the larger", "of the sum", "waited, ms"]
    assert [half[name] for name in shown] == ["20", "18", "1.11x", "0.71x", "1"]
    assert half["memory grew by, MiB (budget)"] == "1.0 (128)"


def test_optimizer_table_shows_the_run_in_which_we_stand_worse() -> None:
    case = {"layout": "flat", "elements": 2**25, "tensors": 1, "dtype": "float32"}
    case |= {"gb_per_s": 50.0, "of_limit": 0.9, "state_bytes": 2**28}
    rows: list[dict[str, Any]] = [{"skipped": "no GPU"}]
    for pages, theirs in (("off", 0.03), ("on", 0.015)):
        rows.append(case | {"huge_pages": pages, "provider": "qlora_ext PagedAdamW", "p50": 0.01})
        rows[-1]["speedup_over"] = {"peer": theirs / 0.01}
        rows.append(case | {"huge_pages": pages, "provider": "peer", "p50": theirs})
    _, ours, peer = tables.optimizer_table(rows)
    assert ours == ["qlora_ext PagedAdamW: 34 M float32, 1 tensors", "10", "50", "90%", "256", "1.50x peer"]
    assert peer[:2] == ["peer: 34 M float32, 1 tensors", "15"]


def test_losses_of_optimizers_that_are_wrong_are_named() -> None:
    losses = {"adamw": 9.0, "paged_adamw32": 2.0, "paged_adamw8": 2.019, "paged_adamw32, in a file": 2.0}
    rows = [{"method": "full", "provider": name, "held_out_loss_after": loss} for name, loss in losses.items()]
    other = [row | {"method": "qlora", "held_out_loss_after": 1.5} for row in rows]
    assert compare_optimizers.wrong([*rows[1:], *other]) == []
    rows[2]["held_out_loss_after"], rows[3]["held_out_loss_after"] = 1.97, 2.0001
    assert compare_optimizers.wrong(rows) == [
        "full, adamw: its held-out loss is 350.00% off, more than 1.0%",
        "full, paged_adamw8: its held-out loss is 1.50% off, more than 1.0%",
        "full, paged_adamw32, in a file: its held-out loss is 0.01% off, more than 0.0%",
    ]


def test_rows_are_compared_with_peers_and_limits() -> None:
    same = [row("qlora_ext", 0.001), row("qlora_ext linear_4bit alone", 0.0008), row("peer", 0.004)]
    suite._compare_with_peers(same)
    assert same[0]["best_peer"] == "peer"
    assert same[0]["speedup_over_best_peer"] == pytest.approx(4)
    assert same[0]["over_linear_4bit"] == pytest.approx(0.25)
    assert "best_peer" not in same[2]


def test_plots_are_drawn_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    errors = [
        {"quant_type": "nf4", "double_quant": double_quant, "blocksize": size, "bits": 4 + 32 / size, "rms_error": 0.1}
        for double_quant in (False, True)
        for size in (64, 256)
    ]
    where = {"cpu_path": "avx2", "cpu": "AMD EPYC (family 25, model 17)"}
    of_path = [row | where for row in ROWS]
    results = {"linear_4bit": of_path, "quantization_error": errors, "train_step": of_path, "optimizer_paging": CURVE}
    for name, rows in results.items():
        plots.draw(name, rows)
        assert plots.paths(name, []) == []
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    names = "linear_4bit-bfloat16-avx2-family25-model17", "quantization_error", "optimizer_paging-avx2"
    assert set(drawn) == {f"{name}.png" for name in names}
    assert all(size < 100_000 for size in drawn.values())


def test_generating_is_greedy_whatever_the_model_asks_for() -> None:
    prompt = torch.tensor([[1, 2, 3]])
    plain, asking = (smollm2.load(None, dtype=torch.float32, tiny=True) for _ in range(2))
    asking.generation_config = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, stop_strings=["a"])
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, plain(expected).logits[:, -1:].argmax(-1)], 1)
    assert bench_generate.generation(asking, prompt, 6)() == expected[0, 3:].tolist()
