"""--target-parameters: adapters on the fused experts of a mixture."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from finetune_command import data as data
from finetune_command import words
from mixtures import BOTH, CONFIGS
from reference import assert_same
from safetensors.torch import load_file
from tiny_model import tiny_tokenizer
from transformers import MixtralForCausalLM

from qlora_ext.finetune import __main__ as cli


def test_finetune_trains_saves_and_resumes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = copy.deepcopy(CONFIGS["mixtral"])
    config.vocab_size = 258
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run = {"model": tmp_path / "model", "data": data, "method": "qlora", "batch-size": 4, "lr": 1e-2, "save-steps": 2}
    run |= {
        "target-parameters": ",".join(BOTH),
        "target-modules": "none",
        "schedule": "constant",
        "samples": 0,
        "eval-examples": 2,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(words({**run, "output": whole, "steps": 4})) == 0
    assert cli.main(words({**run, "output": parts, "steps": 2})) == 0
    capsys.readouterr()
    again = {**run, "output": parts, "steps": 4, "resume": True}
    assert cli.main(words({**again, "target-parameters": BOTH[0]})) == 2
    assert "--resume: --target-parameters: expected" in capsys.readouterr().err
    assert cli.main(words(again)) == 0
    tensors = load_file(whole / "adapter_model.safetensors")
    assert_same(load_file(parts / "adapter_model.safetensors"), tensors)
    assert tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].any()
    assert json.loads((whole / "adapter_config.json").read_text())["target_parameters"] == BOTH
    assert not any("self_attn" in key for key in tensors)
    noted = json.loads((parts / "run.json").read_text())
    del noted["target_parameters"]  # as a run of an earlier version, which had none
    (parts / "run.json").write_text(json.dumps(noted))
    capsys.readouterr()
    assert cli.main(words({**again, "steps": 6})) == 2
    assert "--resume: --target-parameters: expected 'None' as before" in capsys.readouterr().err
