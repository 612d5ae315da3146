"""What a model scores and says on held-out examples; neither touches the state of training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import IGNORE, Example, PadToLongest


def answer_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross entropy of a batch over its labelled tokens, in nats, and how many those are.

    Logits are made of the positions before a label only: with a vocabulary of 50,000 those of the rest would be most of
    the memory of a step.

    Args:
        batch: input_ids, attention_mask and labels, int64 [examples, length], on the model's device.
    """
    labels = batch["labels"][:, 1:]
    labelled = F.pad(labels != IGNORE, (0, 1))  # the position that predicts a label is the one before it
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][labelled],))
    try:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    wanted = labels[labels != IGNORE]
    return F.cross_entropy(logits.float(), wanted, reduction="sum"), len(wanted)


def held_out_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    collate: PadToLongest,
    batch_size: int,
    *,
    autocast: bool = False,
) -> float:
    """Mean cross entropy over all labelled tokens of the examples, in nats.

    Args:
        examples: at least one; their order does not change the mean.
        autocast: compute in bfloat16 from float32 weights, as training with mixed precision does.
    """
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # neighbours pad each other least
    total, count = 0.0, 0
    with _evaluating(model, autocast):
        for start in tqdm(range(0, len(ordered), batch_size), desc="held-out loss", unit="batch", leave=False):
            batch = collate(ordered[start : start + batch_size])
            loss, tokens = answer_loss(model, {key: value.to(model.device) for key, value in batch.items()})
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
    """Continue the prompt of each example greedily, up to the first special token or `max_new_tokens`."""
    stops = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=0,
    )
    generate: Any = model.generate
    answers = []
    with _evaluating(model, autocast):
        for example in tqdm(examples, desc="sample answers", unit="answer", leave=False):
            prompt = torch.tensor([example.input_ids[: example.prompt_length]], device=model.device)
            output = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=generation)
            answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            answers.append(str(answer).strip())
    return answers


@contextmanager
def _evaluating(model: PreTrainedModel, autocast: bool) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        model.train(was_training)
