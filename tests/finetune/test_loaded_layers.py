"""Which layers of a model are loaded in 4 bits, what is computed in, and what a load says of what it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stored_models import QUANTIZE, SIZES, edit
from tiny_model import load, save_tiny_model
from tiny_model import one_thread as one_thread
from transformers import GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM, LlamaForCausalLM

import qlora_ext
from qlora_ext.finetune.load import compute_dtype, load_model, open_checkpoint


def test_a_head_stays_dense_by_whatever_name(tmp_path: Path) -> None:
    config = GPTNeoXJapaneseConfig(**SIZES, tie_word_embeddings=False)
    GPTNeoXJapaneseForCausalLM(config).save_pretrained(tmp_path)
    model = load(tmp_path, quantize=QUANTIZE)
    assert type(model.embed_out) is torch.nn.Linear
    assert isinstance(model.gpt_neox_japanese.layers[0].attention.dense, qlora_ext.Linear4bit)


def test_a_module_without_linear_layers_is_nothing_to_skip(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    with pytest.raises(ValueError, match="--skip: expected names of linear layers or fused experts, got 'norm'"):
        load(tmp_path, quantize=QUANTIZE | {"skip": ["mlp", "norm"]})


def test_a_single_tensor_that_is_left_out_is_told(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    edit(tmp_path, v_head__weight=torch.ones(1, 64))
    with pytest.warns(UserWarning, match=r"1 tensors of parts .* are left out, as 'v_head\.weight'"):
        load(tmp_path)


def test_an_attention_that_the_model_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(ValueError, match="a model that can be built with --attention sdpa, got ValueError: "):
        load_model(open_checkpoint(str(tmp_path)), dtype=torch.float32, device=torch.device("cpu"), attention="sdpa")


@pytest.mark.parametrize("native", [False, True])
def test_auto_dtype_is_bfloat16_on_a_gpu_that_multiplies_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts those that emulate it, too, unless it is told otherwise."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    expected = torch.bfloat16 if native else torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("native", [False, True])
def test_auto_dtype_beside_a_gpu_is_that_of_the_cpu(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not native)
    monkeypatch.setattr(qlora_ext._C, "cpu_paths", lambda: ["avx512", "avx512_bf16"] if native else ["avx512"])
    expected = torch.bfloat16 if native else torch.float32
    assert compute_dtype("auto", torch.device("cpu")) == expected
