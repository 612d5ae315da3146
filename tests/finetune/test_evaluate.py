"""Sample answers and the held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_data import jsonl, load_one
from tiny_model import one_thread as one_thread
from tiny_model import tiny_config, tiny_tokenizer
from tiny_training import DATA, build
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_ext.finetune.data import PadToLongest
from qlora_ext.finetune.encode import Example
from qlora_ext.finetune.evaluate import compared, held_out_loss, sample_answers


def test_prompt_and_reference_are_what_comes_before_an_answer_and_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("once upon")["input_ids"]
    (sample,) = compared(tokenizer, [Example(ids, ids, 4, "")], ["b"], ["a"])
    assert (sample["prompt"], sample["reference"]) == ("once", " upon")


def test_reference_is_the_answer_to_the_prompt_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    said = ["one?", "first answer", "two?", "second answer"]
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=True)]
    example = load_one(jsonl(tmp_path / "d.jsonl", {"messages": turns}), tokenizer)
    (sample,) = compared(tokenizer, [example], ["b"], ["a"])
    assert (sample["prompt"], sample["reference"]) == ("one?", "first answer")


def saying(letter: str) -> LlamaForCausalLM:
    """A model that always says this letter, unless it is kept from it: then the next, and so on."""
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval()
    model.lm_head = torch.nn.Linear(64, 258)
    torch.nn.init.zeros_(model.lm_head.weight)
    (token,) = tiny_tokenizer()(letter)["input_ids"]
    model.lm_head.bias.data = torch.linspace(1, 0, 258).roll(token)
    return model


def test_a_sample_answer_without_an_end_is_of_40_tokens() -> None:
    assert sample_answers(saying("a"), tiny_tokenizer(), [Example([1, 2], [1, 2], 1, "")]) == ["a" * 40]


OWN_CONFIGS: list[dict[str, Any]] = [
    *({"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3, "length_penalty": -9.0}),
    *({"stop_strings": ["a"]}, {"return_dict_in_generate": True}, {"penalty_alpha": 0.6, "top_k": 4}),
    {"suppress_tokens": [64]},
]


@pytest.mark.parametrize("own", OWN_CONFIGS, ids=lambda own: next(iter(own)))
def test_samples_are_greedy_whatever_the_model_asks_for(own: dict[str, Any]) -> None:
    """transformers fills what a GenerationConfig leaves open from the model's own."""
    model, tokenizer = saying("a"), tiny_tokenizer()
    assert tokenizer("a")["input_ids"] == [64]
    model.generation_config = config = GenerationConfig(**own)
    assert sample_answers(model, tokenizer, [Example([1, 2], [1, 2], 1, "")], max_new_tokens=8) == ["a" * 8]
    assert model.generation_config is config


def test_an_answer_ends_at_no_token_of_the_model_alone() -> None:
    model = saying("a")
    model.generation_config = GenerationConfig(eos_token_id=64)
    letters = Tokenizer(models.BPE(vocab=tiny_tokenizer().backend_tokenizer.get_vocab(False), merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    assert not tokenizer.added_tokens_decoder
    assert sample_answers(model, tokenizer, [Example([1, 2], [1, 2], 1, "")], max_new_tokens=4) == ["a a a a"]


def test_held_out_loss_holds_nothing_for_a_backward_pass() -> None:
    model = build("lora")
    enabled: list[bool] = []
    model.lm_head.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    held_out_loss(model, DATA.held_out, PadToLongest(0), 2)
    assert set(enabled) == {False}
