"""Conversations as tokens, with labels on the answers only.

A conversation's text is tokenized once, and a token gets a label when its characters lie in an assistant turn, the
end-of-turn token included, so that the model learns to stop.
"""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .chat import PLAIN, Chat, end_of, shows
from .conversations import Conversation

IGNORE = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One conversation or window of text, as tokens."""

    input_ids: list[int]
    labels: list[int]  # the token's id, or IGNORE where no loss is taken
    prompt_length: int  # tokens that a sample answer starts from
    question: str  # what a person asked, for showing; empty for plain text


class _Tokens(NamedTuple):
    text: str
    ids: list[int]
    places: list[tuple[int, int]]  # the characters of the text that each token stands for, begin and end


class Encoder:
    """Makes an Example of a conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, use_chat_template: bool) -> None:
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer, use_chat_template)
        special = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special, self.ends = set(special), tuple(token.content for token in special.values())

    def __call__(self, turns: Conversation) -> Example:
        """Raises ValueError where the chat template does not write each turn, as it is, after those before it."""
        text = self.chat.text(turns)
        # A template writes its own special tokens, so only the plain form asks the tokenizer for them.
        encoding = self.tokenizer(text, add_special_tokens=not self.chat.templated, return_offsets_mapping=True)
        tokens = _Tokens(text, encoding["input_ids"], encoding["offset_mapping"])
        labels = [IGNORE] * len(tokens.ids)
        for index, turn in enumerate(turns):
            if turn.learned:
                for position in self._answer(turns[: index + 1], tokens):
                    labels[position] = tokens.ids[position]
        self.chat.check_shown(turns, text)
        answered = (position for position, label in enumerate(labels) if label != IGNORE)
        prompt_length = max(1, next(answered, len(labels)))  # a sample answer has to start from something
        first_answer = next((index for index, turn in enumerate(turns) if turn.learned), 0)
        question = turns[first_answer - 1].content if first_answer else ""
        return Example(tokens.ids, labels, prompt_length, question)

    def _answer(self, turns: Conversation, tokens: _Tokens) -> list[int]:
        """Positions of the tokens that the last of these turns is, with its end; `tokens` begin with all of them."""
        through, bare = self.chat.text(turns), self.chat.text(turns[:-1]) if len(turns) > 1 else ""
        before = self.chat.before_answer(turns, through, bare)
        if not tokens.text.startswith(through):
            advice = "give one assistant turn, the last, per example, or --chat plain"
            raise ValueError(f"the chat template rewrites earlier turns; {advice}")
        begin = min(len(before), _shared(bare, through))
        content = turns[-1].content
        if not shows(through[begin:], content):
            got = f"shows {end_of(through[len(before) :])} of {end_of(content)}"
            raise ValueError(f"the chat template leaves out some of an answer: {got}; {PLAIN}")

        answer = [
            position
            for position, (start, end) in enumerate(tokens.places)
            if end > len(before) and start < len(through)
        ]
        # What a template puts after the end-of-turn token (a newline, say) is never generated: no loss on it.
        content = content.strip()
        found = through.find(content, begin)
        said = found + len(content) if found >= 0 else 0  # where the template writes it in its own way
        ends = [position for position in answer if tokens.ids[position] in self.special]
        brings_its_own = content.endswith(self.ends) and not through[said:].strip()
        if not brings_its_own:
            ends = [position for position in ends if tokens.places[position][0] >= said]
        return [position for position in answer if not ends or position <= ends[-1]]


def _shared(one: str, other: str) -> int:
    """How many letters both begin with."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
