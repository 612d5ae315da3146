"""What a chat template leaves out is not left out of the training in silence; what it adds is not learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from labelled_data import jsonl, labelled, load, load_one
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


def test_an_answer_that_its_template_shortens_still_ends_at_its_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"({CONTENT}.split() | join(' '))"))
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "a" + 99 * "\n" + "b"})
    assert labelled(tokenizer, load_one(path, tokenizer)) == "a b<|im_end|>"


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


@pytest.mark.parametrize("said", ["Be brief. /no_think", "/no_think"])
def test_a_switch_that_a_template_takes_out_is_none_of_what_is_left_out(said: str, tmp_path: Path) -> None:
    """As SmolLM3's and Nemotron's templates do."""
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"{CONTENT}.replace('/no_think', '')"))
    path = jsonl(tmp_path / "d.jsonl", conversation(("system", said), ("user", "q"), ("assistant", "a")))
    assert labelled(tokenizer, load_one(path, tokenizer)) == "a<|im_end|>"


@pytest.mark.parametrize("cut", [".split('</think>')[-1]", "[:20]"])
def test_a_question_that_a_template_cuts_is_refused(cut: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"{CONTENT}{cut}"))
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "How do I close <think>x</think> tags?", "response": "a"})
    with pytest.raises(ValueError, match='line 1: the chat template leaves out what the role "user" says'):
        load_one(path, tokenizer)


def test_an_end_in_words_is_learned_behind_a_special_token_of_the_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n### End\n{% endfor %}")
    example = load_one(jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "fill <|im_end|>"}), tokenizer)
    assert labelled(tokenizer, example).endswith("fill <|im_end|>\n### End\n")


def test_an_answer_that_begins_as_the_end_does(tmp_path: Path) -> None:
    turns = "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(turns + "{% if add_generation_prompt %}assistant:\n{% else %}<|im_end|>{% endif %}")
    example = load_one(jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "<b>"}), tokenizer)
    assert labelled(tokenizer, example) == "<b>\n<|im_end|>"


@pytest.mark.parametrize("fold", ["lower", "upper", "trim"])
def test_a_template_that_folds_leaves_nothing_out(fold: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"({CONTENT} | {fold})"))
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "What IS it", "response": "An Answer"})
    assert labelled(tokenizer, load_one(path, tokenizer)).casefold() == "an answer<|im_end|>"


def test_an_end_that_only_whole_turns_have(tmp_path: Path) -> None:
    """Without an answer to come this template ends in a token, and the text of the turns before is no prefix."""
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(turns + "{% if add_generation_prompt %}assistant:{% else %}<|im_end|>{% endif %}")
    example = load_one(jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "yo"}), tokenizer)
    assert labelled(tokenizer, example) == " yo\n<|im_end|>"


def test_the_newline_behind_an_end_that_the_data_brings_is_not_learned(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    example = load_one(jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "yo<|im_end|>"}), tokenizer)
    assert labelled(tokenizer, example).endswith("yo<|im_end|>")


def test_each_of_two_answers_that_begin_alike_has_its_own_end(tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "yo"), ("user", "q"), ("assistant", "yo2")]
    tokenizer = tiny_tokenizer(CHATML)
    example = load_one(jsonl(tmp_path / "d.jsonl", conversation(*turns)), tokenizer)
    assert labelled(tokenizer, example) == "yo<|im_end|>yo2<|im_end|>"


@pytest.mark.parametrize(
    "fault", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"], ids=["zero", "endless"]
)
def test_what_a_template_cannot_compute_is_told_with_its_line(fault: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "q", "response": "a"})
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: "):
        load_one(path, tiny_tokenizer(CHATML + fault))
