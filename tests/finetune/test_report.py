from __future__ import annotations

import errno
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from sample_report import a_report
from tiny_model import tiny_config
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import qlora_ext
from qlora_ext.finetune.optimizer import StatesReport
from qlora_ext.finetune.report import composition, table, write

LINEARS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
EMBEDDING = 258 * 64
NORMS = 5 * 64
ADAPTER = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # r=4


def build(method: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = LlamaForCausalLM(tiny_config()).to(dtype)
    if method == "qlora":
        qlora_ext.quantize_model(model)
    if method != "full":
        qlora_ext.add_adapter(model, qlora_ext.LoraConfig(r=4))
    return model


def test_composition_of_a_quantized_base() -> None:
    got = composition(build("qlora"), adapter=True)
    assert got["total_parameters"] == LINEARS + EMBEDDING + NORMS + ADAPTER
    assert got["trainable_parameters"] == ADAPTER
    assert got["trainable_percent"] == pytest.approx(100 * ADAPTER / got["total_parameters"])
    assert got["adapter_bytes"] == 4 * ADAPTER
    # 4 bits a weight, a code byte a block of 64; for each linear a scale a group of 256 blocks, and an offset.
    stored = LINEARS // 2 + LINEARS // 64 + 14 * (4 + 4)
    assert got["base_bits"] == pytest.approx(8 * stored / LINEARS)
    rotary = 2 * 8 * 4
    assert got["base_bytes"] == stored + 4 * (EMBEDDING + NORMS) + rotary


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float32, 32)])
def test_composition_of_a_plain_base(dtype: torch.dtype, bits: int) -> None:
    got = composition(build("lora", dtype), adapter=True)
    assert got["base_bits"] == bits
    assert got["trainable_parameters"] == ADAPTER
    full = composition(build("full", dtype), adapter=False)
    assert full["trainable_percent"] == 100
    assert full["adapter_bytes"] == 0
    assert full["base_bytes"] == got["base_bytes"]


def test_model_without_linear_layers_has_no_bits() -> None:
    def gpt2(layers: int) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=layers, n_head=4, vocab_size=258))

    assert composition(gpt2(1), adapter=False)["base_bits"] == 32
    got = composition(gpt2(0), adapter=False)
    assert (got["base_bits"], got["trainable_percent"]) == (None, 100)
    assert table(a_report(base_bits=None, method="full")).splitlines()[1].startswith("full    -  ")


def test_table_shows_every_figure() -> None:
    text = table(a_report())
    header, row = text.splitlines()[:2]
    figures = ["qlora", "4.126", "1,234 (1.50 %)", "3.0", "7", "321", "3.000 -> 2.000 (-33.3%)"]
    assert re.split("  +", row.strip()) == figures
    assert text.splitlines()[-4:] == ["prompt:    hi?", "reference: yes ✓", "before:    no", "after:     yes"]
    assert header.index("held-out loss") == row.index("3.000 -> 2.000")
    assert "optimizer: paged_adamw32, states: 0.2 MiB in host memory, 0.8 MiB in the page file; 5 MiB moved" in text
    nothing_moves = {"kind": "adamw", **asdict(StatesReport(device_bytes=2**20))}
    lines = table(a_report(optimizer=nothing_moves)).splitlines()
    assert "optimizer: adamw, states: 1.0 MiB on the device" in lines
    assert "none held out" in table(a_report(held_out_loss_before=None, held_out_loss_after=None))


def test_what_moved_is_told_of_states_that_are_somewhere() -> None:
    moved = "5 MiB moved through 0.1 MiB, 25% of pages not moved, 0.0 s waited"
    assert moved in table(a_report())
    nothing = {"kind": "adamw", **dict.fromkeys(("device_bytes", "host_bytes", "file_bytes", "moved_bytes"), 0)}
    assert "optimizer: adamw, states: none" in table(a_report(optimizer=nothing)).splitlines()


def test_a_loss_that_was_0_before_training_has_no_change_in_percent() -> None:
    row = table(a_report(held_out_loss_before=0.0, held_out_loss_after=0.0)).splitlines()[1]
    assert re.split("  +", row.strip())[-1] == "0.000 -> 0.000"


def test_files_are_written_whole(tmp_path: Path) -> None:
    report = a_report()
    write(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.png"}
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    with Image.open(tmp_path / "report.png") as image:
        assert len(image.convert("L").getcolors(maxcolors=256) or []) > 10, "not a blank picture"
    write(a_report(held_out_loss_before=None, held_out_loss_after=None), tmp_path)


def test_states_that_this_process_has_not_seen(tmp_path: Path) -> None:
    unseen = {"kind": "adamw", **dict.fromkeys(asdict(StatesReport()))}
    report = a_report(optimizer=unseen, optimizer_bytes=None, gradient_bytes=None, tokens_per_second=None)
    assert "optimizer: adamw, states: not seen, as all steps had been made before --resume" in table(report)
    write(report, tmp_path)
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize("failing", ["report.json", "report.png"])
def test_failure_leaves_no_report(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run takes report.json to say that all is done."""
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if failing in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/{failing}'"):
        write(a_report(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_report_is_json_without_nan(tmp_path: Path) -> None:
    write(a_report(losses=[1.0, math.nan], held_out_losses=[(1, math.nan)], held_out_loss_before=math.inf), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert (report["losses"], report["held_out_loss_before"]) == ([1.0, None], None)


def test_peak_rss_remembers_the_highest() -> None:
    script = "from qlora_ext.finetune.report import peak_rss as p; a = p(); x = b'x' * 2**28; del x; print(p() - a)"
    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(child.stdout) > 2**27  # part of the peak of the imports may be free again by then
