"""Byte order marks, halves of characters, and the tokens that a tokenizer puts around a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_data import load, load_one
from tiny_model import tiny_tokenizer
from tokenizers import processors


def test_a_window_of_text_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    first = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [first])
    (tmp_path / "d.txt").write_text("once")
    assert tokenizer.decode(load_one(tmp_path / "d.txt", tokenizer).input_ids) == "<|im_start|>once"


def test_only_a_byte_order_mark_that_begins_the_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("\ufeffa\n\ufeffb".encode())
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(load_one(tmp_path / "d.txt", tokenizer).input_ids) == "a\n\ufeffb"


@pytest.mark.parametrize("half", ["\\udc00", "\\udfff"])
def test_the_second_half_of_a_character_is_named(half: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(f'{{"prompt": "{half}", "response": "a"}}')
    with pytest.raises(ValueError, match=r'line 1: expected "prompt" to be Unicode text, got half a character'):
        load(tmp_path / "d.jsonl", tiny_tokenizer())
