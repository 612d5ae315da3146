"""Conversations as text: by a tokenizer's chat template, or as lines of "role: content"."""

import json
import re

import jinja2
from transformers import PreTrainedTokenizerBase

from .conversations import Conversation, Turn

# How a chat template may end a prompt so that the model thinks first, which answers in data seldom do.
THINKING = re.compile(r"(</?think(ing)?>\s*)+$")
PLAIN = "--chat plain does without the template"
MARK = "\ue000"  # no letter of any language: in no template, and stays as it is when a template strips or folds
# What a template raises of turns that it does not take, or of any.
REFUSED = (ValueError, TypeError, ArithmeticError, NameError, RuntimeError, jinja2.TemplateError)


class Chat:
    """Writes turns as text, and tells what of it comes ahead of an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, use_template: bool) -> None:
        self.tokenizer = tokenizer
        self.templated = use_template and tokenizer.chat_template is not None

    def text(self, turns: Conversation, answer_follows: bool = False) -> str:
        """The turns, and with `answer_follows` how an answer to them begins."""
        if self.templated:
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
            )
        end = {"assistant": self.tokenizer.eos_token or ""}
        lines = "".join(f"{turn.role}: {turn.content}{end.get(turn.role, '')}\n" for turn in turns)
        return lines + ("assistant:" if answer_follows else "")

    def before_answer(self, turns: Conversation, through: str, bare: str) -> str:
        """What of `through`, the text of `turns`, comes ahead of the last of them; `bare`: of those before it."""
        if len(turns) == 1 and self.templated:
            # transformers refuses to render no turns, so before a first answer is what its own text has ahead of it.
            head = self.text((Turn("assistant", MARK, True),)).partition(MARK)[0]
            if not through.startswith(head) or not through[len(head) :].lstrip().startswith(turns[0].content.strip()):
                raise ValueError(
                    "the chat template rewrites the first turn, of the assistant; begin with one of the user"
                )
            return head
        prompt = self.text(turns[:-1], answer_follows=True)
        unthinking = THINKING.sub("", prompt)
        for before in (prompt, unthinking if len(unthinking) >= len(bare) else bare, bare):
            if through.startswith(before):
                return before
        raise ValueError(
            f"the chat template rewrites earlier turns: expected a text that begins with {end_of(bare)}, its own of "
            f"the turns before an answer, got {end_of(through[: len(bare)])}; {PLAIN}"
        )

    def check_shown(self, turns: Conversation, text: str) -> None:
        """ValueError if `text`, that of `turns`, leaves out what another than the assistant says."""
        squeezed = _squeezed(text)
        for index, turn in enumerate(turns):  # of an earlier answer thoughts may be left out
            if turn.role == "assistant" or _shows(squeezed, turn.content):
                continue
            if self._leaves_out(turns, index):
                raise ValueError(f'the chat template leaves out what the role "{turn.role}" says; {PLAIN}')

    def _leaves_out(self, turns: Conversation, index: int) -> bool:
        """Whether the text is without the beginning or end of a turn.

        A template may remove a switch (/no_think) from within a turn.
        """
        turn = turns[index]._replace(content=f"{MARK}{turns[index].content}{MARK}")
        try:
            text = self.text((*turns[:index], turn, *turns[index + 1 :]))
        except REFUSED:  # as it reads what is said
            return False
        return max(text.count(MARK), text.count(json.dumps(MARK)[1:-1])) < 2


def shows(text: str, content: str) -> bool:
    """Whether the content is in the text but for white space and case, perhaps as a string of JSON."""
    return _shows(_squeezed(text), content)


def end_of(text: str) -> str:
    """The text for a message, its end if it is long."""
    return repr(text if len(text) <= 60 else f"...{text[-60:]}")


def _shows(squeezed: str, content: str) -> bool:
    return any(_squeezed(form) in squeezed for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]))


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()
