"""Where a model is looked for, and what of its folder is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from stored_models import QUANTIZE, edit
from tiny_model import assert_same_model, load, save_tiny_model
from tiny_model import one_thread as one_thread
from transformers import GenerationConfig

from qlora_ext.finetune.load import HUB_FILES, open_checkpoint


@pytest.mark.parametrize("source", ["gone.gguf", "models/my/llama", "/gone"])
def test_what_can_only_be_a_path_is_not_looked_up(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_ext.finetune.load.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(FileNotFoundError, match=f"{source}: no such file or folder"):
        open_checkpoint(source)


def test_what_is_no_name_of_the_hub_is_a_missing_folder() -> None:
    with pytest.raises(FileNotFoundError, match="my model: no such folder, and not fetched from the hub"):
        open_checkpoint("my model")


def test_all_that_a_model_and_its_tokenizer_need_is_fetched() -> None:
    files = ["config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    assert list(filter_repo_objects(files, allow_patterns=HUB_FILES)) == files


def test_one_file_of_weights_needs_no_index(tmp_path: Path) -> None:
    saved = save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert_same_model(load(tmp_path), saved)


def test_generation_ends_as_the_folder_says(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    GenerationConfig(eos_token_id=[2, 7], temperature=0.6, do_sample=True).save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.eos_token_id == [2, 7]


def test_a_weight_of_integers_is_named(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    edit(tmp_path, model__layers__0__mlp__up_proj__weight=torch.zeros(128, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.0\.mlp\.up_proj\.weight': "):
        load(tmp_path, quantize=QUANTIZE)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("cannot be read")

    monkeypatch.setattr("qlora_ext.finetune.model_folder.safe_open", fail)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load(tmp_path)
