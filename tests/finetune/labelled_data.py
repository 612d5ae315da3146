"""Data files of a few lines, and what is learned of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from qlora_ext.finetune.data import Dataset, load_data
from qlora_ext.finetune.encode import IGNORE, Example


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Dataset:
    usual = {"max_length": 512, "held_out_fraction": 0.1, "seed": 0, "use_chat_template": True}
    return load_data(path, tokenizer, **usual | options)


def load_one(path: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Example:
    (example,) = load(path, tokenizer, held_out_fraction=0, **options).train
    return example


def labelled(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])
