"""Training examples from a file, in two parts: to train on, and held out.

JSONL holds one example a line, {"prompt": str, "response": str} or {"messages": [{"role": str, "content": str}, ...]};
a message with "weight": 0 or "train": false is only context. A .txt file is tokenized whole and cut into windows of
max_length tokens with a label on every one.
"""

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .chat import REFUSED
from .conversations import read_conversations, read_lines
from .encode import IGNORE, Encoder, Example

TEXT_PROMPT = 16  # tokens of a text window that a sample answer continues


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and to hold out, and what became of the rest."""

    train: list[Example]
    held_out: list[Example]
    duplicates: int
    truncated: int
    dropped: int  # no answer token within max_length
    unread: tuple[str, ...] = ()  # fields of the file that say nothing here


def is_text(path: Path) -> bool:
    """Whether a file holds plain text, not JSONL."""
    return path.suffix == ".txt"


def load_data(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    held_out_fraction: float,
    seed: int,
    use_chat_template: bool,
) -> Dataset:
    """Read, tokenize, de-duplicate and split a data file; the same file and seed give the same split.

    Args:
        path: a .txt file (plain text) or JSONL (anything else), UTF-8.
        tokenizer: a fast tokenizer; without a chat template a conversation becomes lines of "role: content".
        max_length: longest example, tokens; longer ones lose their right end.
        held_out_fraction: share of the examples kept from training, in [0, 1); at least one example unless 0.
        seed: of the split.
        use_chat_template: False ignores the tokenizer's template.

    Returns: the split examples and counts of those removed; duplicates go before the split, so none leaks across.
    Raises: ValueError naming file and line; FileNotFoundError.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__}: expected a fast tokenizer (tokenizer.json), got another")
    unread: set[str] = set()
    if is_text(path):
        examples = _text_windows(path, tokenizer, max_length)
    else:
        examples = _conversations(path, Encoder(tokenizer, use_chat_template), unread)
    distinct, duplicates, truncated = _distinct(examples, max_length)
    kept = [example for example in distinct if any(label != IGNORE for label in example.labels[1:])]
    if not kept:
        raise ValueError(
            f"{path}: no example has a token to learn within {max_length} tokens, in answers of a weight other than 0"
        )
    random.Random(seed).shuffle(kept)
    held_out = max(1, round(len(kept) * held_out_fraction)) if held_out_fraction > 0 else 0
    if held_out >= len(kept):
        raise ValueError(f"{path}: {len(kept)} example(s) are too few to hold out {held_out_fraction:g} of them")
    return Dataset(
        train=kept[held_out:],
        held_out=kept[:held_out],
        duplicates=duplicates,
        truncated=truncated,
        dropped=len(distinct) - len(kept),
        unread=tuple(sorted(unread)),
    )


def _distinct(examples: Iterable[Example], max_length: int) -> tuple[list[Example], int, int]:
    """One example for each sequence of tokens, cut to max_length, with a label wherever any of its duplicates has one;
    then the numbers of duplicates and of examples cut."""
    first: dict[bytes, Example] = {}
    cut = set()
    seen = 0
    for whole in examples:
        example = _truncate(whole, max_length)
        tokens = array("q", example.input_ids).tobytes()
        same = first.get(tokens, example)
        earlier = min(same, example, key=lambda each: each.prompt_length)
        first[tokens] = replace(earlier, labels=list(map(max, same.labels, example.labels)))  # IGNORE is below any
        if len(whole.input_ids) > max_length:
            cut.add(tokens)
        seen += 1
    return list(first.values()), seen - len(first), len(cut)


class PadToLongest:
    """Collate examples into a batch as long as its longest one.

    Padding is marked by length, in attention_mask and labels, never by comparing ids: many tokenizers pad with
    the end-of-turn token, which must keep its label.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels, int64 [len(examples), longest]."""
        ids = [torch.tensor(example.input_ids) for example in examples]
        labels = [torch.tensor(example.labels) for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }


def _conversations(path: Path, encode: Encoder, unread: set[str]) -> Iterator[Example]:
    lines = list(read_conversations(path, unread))  # a bad one ends this in seconds, not after minutes
    for number, turns in tqdm(lines, desc="tokenizing", unit="example", leave=False):
        try:
            yield encode(turns)
        except REFUSED as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def _text_windows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    text = "".join(line for _, line in read_lines(path))
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    for start in range(0, len(ids), max_length):
        window = ids[start : start + max_length]
        yield Example(window, window, min(TEXT_PROMPT, len(window) // 2), "")


def _truncate(example: Example, max_length: int) -> Example:
    ids, labels = example.input_ids[:max_length], example.labels[:max_length]
    return replace(example, input_ids=ids, labels=labels)
