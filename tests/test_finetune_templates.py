"""What a chat template leaves out is not left out of the training in silence; what it adds is not learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_finetune_data import jsonl, labelled, load, load_one
from tiny_model import CHATML, tiny_tokenizer

CONTENT = "message['content']"


def conversation(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **fields} for role, content in turns]}


def test_an_answer_without_its_thoughts_is_refused(tmp_path: Path) -> None:
    """As templates of DeepSeek-R1's distilled models show it: the model would learn to answer without them."""
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"{CONTENT}.split('</think>')[-1]"))
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "<think>so</think>\n\nthus"})
    message = (
        r"line 1: the chat template leaves out some of an answer: shows .*thus.* of '<think>so.*; --chat plain does"
    )
    with pytest.raises(ValueError, match=message):
        load_one(path, tokenizer)
    whole = load_one(path, tiny_tokenizer(CHATML))
    assert labelled(tokenizer, whole) == "<think>so</think>\n\nthus<|im_end|>"


def test_thoughts_that_a_template_writes_in_its_own_way_are_there(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"{CONTENT}.replace('</think>', '\\n</think>\\n\\n')"))
    example = load_one(jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "<think>so</think>thus"}), tokenizer)
    assert labelled(tokenizer, example) == "<think>so\n</think>\n\nthus<|im_end|>"


@pytest.mark.parametrize("role", ["tool", "system"])
def test_a_role_that_the_template_leaves_out_is_refused(role: str, tmp_path: Path) -> None:
    known = CHATML.replace(
        "{% for message in messages %}", f"{{% for message in messages if message['role'] != '{role}' %}}"
    )
    assert known != CHATML
    path = jsonl(tmp_path / "d.jsonl", conversation((role, "what it says"), ("user", "q"), ("assistant", "a")))
    with pytest.raises(ValueError, match=f'line 1: the chat template leaves out what the role "{role}" says; --chat'):
        load_one(path, tiny_tokenizer(known))
    load_one(path, tiny_tokenizer(CHATML))


def test_what_a_template_shows_as_json_is_there(tmp_path: Path) -> None:
    """As Llama 3.1 and Command R show a tool's results."""
    turns = conversation(("user", "q"), ("tool", '{"a": "ü\n"}'), ("assistant", "a"))
    as_json = CHATML.replace(CONTENT, f"({CONTENT} | tojson if message['role'] == 'tool' else {CONTENT})")
    load_one(jsonl(tmp_path / "d.jsonl", turns), tiny_tokenizer(as_json))


def test_special_tokens_in_an_answer_do_not_end_it(tmp_path: Path) -> None:
    """Where the turn ends in none, what comes behind them is learned, too."""
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "x<|im_end|>y"})
    assert "x<|im_end|>y" in labelled(tokenizer, load_one(path, tokenizer))
    ended = tiny_tokenizer(CHATML)
    assert labelled(ended, load_one(path, ended)) == "x<|im_end|>y<|im_end|>"


def test_examples_that_only_the_template_or_the_cut_makes_alike_are_one(tmp_path: Path) -> None:
    """Else what is held out would be trained on."""
    trimming = tiny_tokenizer(CHATML.replace(CONTENT, f"{CONTENT} | trim"))
    records = [{"prompt": f"{' ' * i}q", "response": f"a{chr(10) * i}"} for i in range(5)]
    data = load(jsonl(tmp_path / "d.jsonl", *records), trimming, held_out_fraction=0)
    assert (len(data.train), data.duplicates) == (1, 4)
    long = [{"prompt": "q", "response": "a" * 60 + str(i)} for i in range(5)]
    cut = load(jsonl(tmp_path / "long.jsonl", *long), trimming, held_out_fraction=0, max_length=40)
    assert (len(cut.train), cut.duplicates, cut.truncated) == (1, 4, 1)
