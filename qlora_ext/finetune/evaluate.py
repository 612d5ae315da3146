"""What a model scores and says on held-out examples; neither touches the state of training."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import PadToLongest
from .encode import IGNORE, Example
from .loss import answer_loss
from .model_checks import position_limit


def held_out_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    collate: PadToLongest,
    batch_size: int,
    *,
    autocast: bool = False,
    chunk: int | None = None,
) -> float:
    """Mean cross entropy over all labelled tokens of the examples, in nats.

    Args:
        examples: at least one; their order does not change the mean.
        autocast: compute in bfloat16 from float32 weights, as training with mixed precision does.
        chunk: as for `answer_loss`.
    """
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # neighbours pad each other least
    total, count = 0.0, 0
    with _evaluating(model, autocast):
        for start in tqdm(range(0, len(ordered), batch_size), desc="held-out loss", unit="batch", leave=False):
            batch = collate(ordered[start : start + batch_size])
            loss, tokens = answer_loss(model, {key: value.to(model.device) for key, value in batch.items()}, chunk)
            total, count = total + loss.item(), count + tokens
    return total / count


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 40,
    autocast: bool = False,
) -> list[str]:
    """Continue a prompt greedily, whatever the model's own generation_config says.

    An answer ends at a special token of the tokenizer, after `max_new_tokens` or at the model's last position.
    """
    stops = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    generation = GenerationConfig(do_sample=False, use_cache=True, eos_token_id=stops or None, pad_token_id=0)
    limit = position_limit(model) or sys.maxsize
    generate: Any = model.generate
    answers = []
    with _evaluating(model, autocast), _without_own_generation_config(model):
        for example in tqdm(examples, desc="sample answers", unit="answer", leave=False):
            generation.max_new_tokens = min(max_new_tokens, limit - example.prompt_length)
            prompt = torch.tensor([example.input_ids[: example.prompt_length]], device=model.device)
            output = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=generation)
            answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            answers.append(str(answer).strip())
    return answers


def compared(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], before: list[str], after: list[str]
) -> list[dict[str, Any]]:
    """Of each example its first prompt, the answer to it in the data, and those before and after the training."""
    return [
        {
            "prompt": example.question or tokenizer.decode(example.input_ids[: example.prompt_length]),
            "reference": tokenizer.decode(
                list(takewhile(lambda label: label != IGNORE, example.labels[example.prompt_length :])),
                skip_special_tokens=True,
            ),
            "before": answer_before,
            "after": answer_after,
        }
        for example, answer_before, answer_after in zip(examples, before, after, strict=True)
    ]


@contextmanager
def _evaluating(model: PreTrainedModel, autocast: bool) -> Iterator[None]:
    was_training = model.training
    model.eval()
    # Compiled layers (--compile) run as they are: with a cache, each would be compiled by itself for its place in it.
    eager = torch.compiler.set_stance("force_eager")
    try:
        with eager, torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        model.train(was_training)


@contextmanager
def _without_own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """From it generate() takes all that it is not told otherwise: penalties, beams, ends, and what it returns."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
