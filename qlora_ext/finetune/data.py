"""Training examples from a file: token ids, and labels on the answers only.

JSONL holds one example a line, {"prompt": str, "response": str} or {"messages": [{"role": str, "content": str},
...]}; a message of weight 0 is no answer to learn. A conversation is rendered as text by the tokenizer's chat template,
tokenized once, and a token gets a label when its characters lie in an assistant turn, the end-of-turn token included,
so that the model learns to stop. A .txt file is tokenized whole and cut into windows of max_length tokens with a label
on every one.
"""

import json
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .conversations import Conversation, Turn, read_conversations, read_lines

IGNORE = -100  # the label that cross entropy leaves out
TEXT_PROMPT = 16  # tokens of a text window that a sample answer continues
# How a chat template may end a prompt so that the model thinks first, which answers in data seldom do.
THINKING = re.compile(r"(</?think(ing)?>\s*)+$")
PLAIN = "--chat plain does without the template"
MARK = "\ue000"  # no letter of any language: in no template, and stays as it is when a template strips or folds


@dataclass(frozen=True)
class Example:
    """One conversation or window of text, as tokens."""

    input_ids: list[int]
    labels: list[int]  # the token's id, or IGNORE where no loss is taken
    prompt_length: int  # tokens that a sample answer starts from
    question: str  # what a person asked, for showing; empty for plain text


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
        examples = _conversations(path, _Render(tokenizer, use_chat_template), unread)
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
    """Cut to max_length tokens, and of those with the same ones the first, which learns what any of them does; how
    many more there were, and how many are cut."""
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


class _Render:
    """Makes text of turns: by the chat template, or as lines of "role: content"."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, use_chat_template: bool) -> None:
        self.tokenizer = tokenizer
        self.templated = use_chat_template and tokenizer.chat_template is not None
        special = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special, self.ends = set(special), tuple(token.content for token in special.values())

    def __call__(self, turns: Conversation, answer_follows: bool = False) -> str:
        if self.templated:
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
            )
        end = {"assistant": self.tokenizer.eos_token or ""}
        lines = "".join(f"{turn.role}: {turn.content}{end.get(turn.role, '')}\n" for turn in turns)
        return lines + ("assistant:" if answer_follows else "")


def _conversations(path: Path, render: _Render, unread: set[str]) -> Iterator[Example]:
    lines = list(read_conversations(path, unread))  # a bad one ends this in seconds, not after minutes
    for number, turns in tqdm(lines, desc="tokenizing", unit="example", leave=False):
        try:
            yield _encode(turns, render)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def _encode(turns: Conversation, render: _Render) -> Example:
    text = render(turns)
    # A template writes its own special tokens, so only the plain form asks the tokenizer for them.
    encoding = render.tokenizer(text, add_special_tokens=not render.templated, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    places: list[tuple[int, int]] = encoding["offset_mapping"]
    labels = [IGNORE] * len(ids)
    for index, turn in enumerate(turns):
        if not turn.learned:
            continue
        through, bare = render(turns[: index + 1]), render(turns[:index]) if index else ""
        before = _before(turns[: index + 1], through, bare, render)
        if not text.startswith(through):
            advice = "give one assistant turn, the last, per example, or --chat plain"
            raise ValueError(f"the chat template rewrites earlier turns; {advice}")
        begin = min(len(before), _shared(bare, through))
        if not _shows(_squeezed(through[begin:]), turn.content):
            got = f"shows {_end(through[len(before) :])} of {_end(turn.content)}"
            raise ValueError(f"the chat template leaves out some of an answer: {got}; {PLAIN}")
        answer = [place for place, (start, end) in enumerate(places) if end > len(before) and start < len(through)]
        # What a template puts after the end-of-turn token (a newline, say) is never generated: no loss on it.
        content = turn.content.strip()
        found = text.find(content, begin, len(through))
        said = found + len(content) if found >= 0 else 0  # where the template writes it in its own way
        specials = [position for position in answer if ids[position] in render.special]
        ends = [position for position in specials if places[position][0] >= said]
        if content.endswith(render.ends) and not text[said : len(through)].strip():  # the data brings an end of its own
            ends = specials
        for position in answer:
            if not ends or position <= ends[-1]:
                labels[position] = ids[position]
    shown = _squeezed(text)
    for index, turn in enumerate(turns):  # of an earlier answer thoughts may be left out
        if turn.role != "assistant" and not _shows(shown, turn.content) and _is_left_out(turns, index, render):
            raise ValueError(f'the chat template leaves out what the role "{turn.role}" says; {PLAIN}')
    answered = (position for position, label in enumerate(labels) if label != IGNORE)
    first_answer = next((index for index, turn in enumerate(turns) if turn.learned), 0)
    prompt_length = max(1, next(answered, len(ids)))  # a sample answer has to start from something
    return Example(ids, labels, prompt_length, question=turns[first_answer - 1].content if first_answer else "")


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def _shows(squeezed: str, content: str) -> bool:
    """Whether the content is in the text but for white space and case, perhaps as a string of JSON."""
    return any(_squeezed(form) in squeezed for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]))


def _is_left_out(turns: Conversation, index: int, render: _Render) -> bool:
    """Whether the text is without the beginning or end of what this turn says; a switch in it a template may take."""
    turn = turns[index]._replace(content=f"{MARK}{turns[index].content}{MARK}")
    try:
        text = render((*turns[:index], turn, *turns[index + 1 :]))
    except (ValueError, TypeError, jinja2.TemplateError):  # as it reads what is said
        return False
    return max(text.count(MARK), text.count(json.dumps(MARK)[1:-1])) < 2


def _shared(one: str, other: str) -> int:
    """How many letters both begin with."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _before(turns: Conversation, through: str, bare: str, render: _Render) -> str:
    """What of `through`, the text of `turns`, comes ahead of the last of them, an answer; `bare`: of those before."""
    if len(turns) == 1 and render.templated:
        # transformers refuses to render no turns, so before a first answer is what its own text has ahead of it.
        head = render((Turn("assistant", MARK, True),)).partition(MARK)[0]
        if not through.startswith(head) or not through[len(head) :].lstrip().startswith(turns[0].content.strip()):
            raise ValueError("the chat template rewrites the first turn, of the assistant; begin with one of the user")
        return head
    prompt = render(turns[:-1], True)
    unthinking = THINKING.sub("", prompt)
    for before in (prompt, unthinking if len(unthinking) >= len(bare) else bare, bare):
        if through.startswith(before):
            return before
    raise ValueError(
        f"the chat template rewrites earlier turns: expected a text that begins with {_end(bare)}, its own of the "
        f"turns before an answer, got {_end(through[: len(bare)])}; {PLAIN}"
    )


def _end(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-60:]}")


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
