"""Sample answers and the held-out loss."""

from __future__ import annotations

import torch
from tiny_model import one_thread as one_thread
from tiny_model import tiny_config, tiny_tokenizer
from tiny_training import DATA, build
from transformers import LlamaForCausalLM

from qlora_ext.finetune.data import PadToLongest
from qlora_ext.finetune.encode import Example
from qlora_ext.finetune.evaluate import compared, held_out_loss, sample_answers


def test_prompt_and_reference_are_what_comes_before_an_answer_and_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("once upon")["input_ids"]
    (sample,) = compared(tokenizer, [Example(ids, ids, 4, "")], ["b"], ["a"])
    assert (sample["prompt"], sample["reference"]) == ("once", " upon")


def test_a_sample_answer_without_an_end_is_of_40_tokens() -> None:
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval()
    model.lm_head = torch.nn.Linear(64, 258)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.eye(258)[tokenizer("a")["input_ids"][0]]
    assert sample_answers(model, tokenizer, [Example([1, 2], [1, 2], 1, "")]) == ["a" * 40]


def test_held_out_loss_holds_nothing_for_a_backward_pass() -> None:
    model = build("lora")
    enabled: list[bool] = []
    model.lm_head.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    held_out_loss(model, DATA.held_out, PadToLongest(0), 2)
    assert set(enabled) == {False}
