"""Data for tokenizers that differ: in the special tokens they add, in which tokens are special, and in their kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_model import CHATML, tiny_config, tiny_tokenizer
from tokenizers import processors
from transformers import ByT5Tokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from qlora_ext.finetune.data import load_data
from qlora_ext.finetune.encode import IGNORE, Example
from qlora_ext.finetune.evaluate import sample_answers

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def load_one(folder: Path, tokenizer: PreTrainedTokenizerBase, response: str = "yo") -> Example:
    path = folder / "d.jsonl"
    path.write_text(json.dumps({"prompt": "hi", "response": response}))
    options = {"max_length": 512, "held_out_fraction": 0.0, "seed": 0, "use_chat_template": True}
    (example,) = load_data(path, tokenizer, **options).train
    return example


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"),
        (None, "<|im_start|>user: hi\nassistant: yo<|im_end|>\n"),
    ],
    ids=["template", "plain"],
)
def test_the_tokenizers_own_special_tokens_are_of_the_plain_form(
    template: str | None, text: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(template)
    first = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [first])
    assert tokenizer.decode(load_one(tmp_path, tokenizer).input_ids) == text


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
def test_an_answer_ends_at_none_of_its_own_tokens(special: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(PLAIN)
    tokenizer.add_tokens(["<tool>"], special_tokens=special)
    example = load_one(tmp_path, tokenizer, "a<tool>b")
    labels = [label for label in example.labels if label != IGNORE]
    assert tokenizer.decode(labels).removeprefix("assistant: ").rstrip("\n") == "a<tool>b"


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
def test_a_sample_answer_stops_at_special_tokens_alone(special: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=special)
    model = LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=False)).eval()
    model.lm_head = torch.nn.Linear(64, len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data.copy_(torch.arange(len(tokenizer)))  # it can only say the last token
    answers = sample_answers(model, tokenizer, [Example([1, 2, 3], [1, 2, 3], 3, "")], max_new_tokens=3)
    assert answers == ["" if special else "<tool><tool><tool>"]
    assert not model.training


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ByT5Tokenizer: expected a fast tokenizer"):
        load_one(tmp_path, ByT5Tokenizer())
