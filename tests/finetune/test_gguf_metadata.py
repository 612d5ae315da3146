"""What the metadata of a .gguf file says of the model and of how its tokenizer splits text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf
from tiny_model import assert_same_model, load, save_tiny_model, tiny_tokenizer
from tiny_model import one_thread as one_thread
from transformers import PreTrainedTokenizerFast

from qlora_ext.finetune.load import open_checkpoint


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path), llama__expert_count=4.0)
    with pytest.raises(ValueError, match=r"m\.gguf: mixture-of-experts files are not handled"):
        load(tmp_path / "m.gguf")


LEFT_OUT: dict[str, tuple[str, Callable[..., None]]] = {
    "size of the vocabulary": (
        "add_vocab_size",
        lambda writer, size: writer.add_token_list([str(i) for i in range(size)]),
    ),
    "key and value heads": ("add_head_count_kv", lambda *_: None),
    "base of the rotary embedding": ("add_rope_freq_base", lambda *_: None),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_a_file_may_leave_out(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_tiny_model(tmp_path, num_key_value_heads=4)
    monkeypatch.setattr(gguf.GGUFWriter, *LEFT_OUT[what])
    write_gguf(tmp_path / "m.gguf", saved)
    assert_same_model(load(tmp_path / "m.gguf"), saved)


def test_first_and_last_token_and_positions_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_vocab_size

    def with_ends(writer: gguf.GGUFWriter, size: int) -> None:
        add(writer, size)
        writer.add_bos_token_id(5)
        writer.add_eos_token_id(7)

    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", with_ends)
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path, max_position_embeddings=77))
    config = open_checkpoint(str(tmp_path / "m.gguf")).config()
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (5, 7, 77)


TOKENS_OF_12 = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), 2),
    **dict.fromkeys(("gpt-2", "default", "llama-bpe", None), 1),
}


@pytest.mark.parametrize("split", TOKENS_OF_12)
def test_only_vocabularies_of_lone_digits_split_numbers(
    split: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the others transformers knows better."""
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: tiny_tokenizer())
    metadata = {"tokenizer__ggml__model": "gpt2"} | ({"tokenizer__ggml__pre": split} if split else {})
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path), **metadata)
    tokenizer = open_checkpoint(str(tmp_path / "m.gguf")).tokenizer()
    assert len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12")) == TOKENS_OF_12[split]


def test_how_to_split_is_of_tokenizers_as_gpt2s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_tokenizer()
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: made)
    metadata = {"tokenizer__ggml__model": "llama", "tokenizer__ggml__pre": "newest"}
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path), **metadata)
    assert open_checkpoint(str(tmp_path / "m.gguf")).tokenizer() is made


def test_a_tensor_of_a_kind_that_gguf_cannot_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise NotImplementedError

    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path))
    monkeypatch.setattr(gguf, "dequantize", unknown)
    with pytest.raises(ValueError, match=r"m\.gguf: tensor 'token_embd\.weight' is stored as F32, not handled"):
        load(tmp_path / "m.gguf")


def edit(path: Path, field: str, part: int, value: int) -> None:
    """Overwrite one number of a field of the metadata, or of what the file says of a tensor."""
    reader = gguf.GGUFReader(path, "r+")
    known = {tensor.name: tensor.field for tensor in reader.tensors} | reader.fields
    known[field].parts[part][0] = value
    reader.data.flush()


LIES = {
    "array longer than the file": ("tokenizer.ggml.tokens", 4, 10**15, "not a readable GGUF file, or a truncated one"),
    "tensor ahead of the data": ("output_norm.weight", -1, 2**64 - 32, "'output_norm.weight': expected it at byte"),
    "tensor on another": ("output_norm.weight", -1, 32, "'output_norm.weight': expected it at byte"),
    "tensor of another size": ("blk.0.attn_norm.weight", -2, gguf.GGMLQuantizationType.F16, "expected it at byte"),
    "no heads": ("llama.attention.head_count", -1, 0, r"expected the metadata of a config, got ZeroDivisionError"),
    "heads that do not fit": ("llama.attention.head_count", -1, 7, "expected the metadata of a config, got "),
}


@pytest.mark.parametrize(("field", "part", "value", "message"), LIES.values(), ids=LIES)
def test_a_file_that_says_what_cannot_be_is_refused(
    field: str, part: int, value: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_vocab_size

    def with_tokens(writer: gguf.GGUFWriter, size: int) -> None:
        add(writer, size)
        writer.add_token_list([str(i) for i in range(size)])

    monkeypatch.setattr(gguf.GGUFWriter, "add_vocab_size", with_tokens)
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path))
    load(tmp_path / "m.gguf")
    edit(tmp_path / "m.gguf", field, part, value)
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        load(tmp_path / "m.gguf")


def test_a_tokenizer_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    write_gguf(tmp_path / "alone" / "m.gguf", save_tiny_model(tmp_path), tokenizer__ggml__model="t5")
    with pytest.raises(ValueError, match=r"m\.gguf: expected the metadata of a tokenizer, got "):
        open_checkpoint(str(tmp_path / "alone" / "m.gguf")).tokenizer()


@pytest.mark.parametrize("name", ["blk.1.attn_q.bias", "output_norm.bias"])
def test_biases_are_not_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = gguf.GGUFWriter.write_header_to_file

    def with_bias(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(name, np.ones(64, dtype=np.float32))
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_bias)
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path))
    with pytest.raises(ValueError, match=rf"m\.gguf: biases \({name}\) are not handled"):
        load(tmp_path / "m.gguf")


def test_numbers_in_the_other_byte_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = gguf.GGUFWriter.__init__
    monkeypatch.setattr(gguf.GGUFWriter, "__init__", partialmethod(made, endianess=gguf.GGUFEndian.BIG))
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path))
    with pytest.raises(ValueError, match=r"m\.gguf: not a readable GGUF file.* \(of the other byte order\)"):
        load(tmp_path / "m.gguf")
