"""Which tokens of a conversation are learned, under templates and tokenizers that few have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from labelled_data import jsonl, labelled, load, load_one
from tiny_model import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_ext.finetune.encode import IGNORE

CONTENT = "message['content']"
LINES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CONTENTS = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def pair(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def conversation(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **fields} for role, content in turns]}


def merging(*merges: tuple[str, str], **special: str) -> PreTrainedTokenizerFast:
    """Bytes and these pairs of them, which reach over spaces, as SentencePiece's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: index for index, byte in enumerate([*alphabet, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_token_that_begins_before_an_answer_is_learned(tmp_path: Path) -> None:
    tokenizer = merging((":", "Ġ"), eos_token="<|im_end|>")
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", "yo")), tokenizer)
    assert labelled(tokenizer, example) == ": yo<|im_end|>"


def test_a_token_that_an_answer_shares_with_the_next_turn_is_learned(tmp_path: Path) -> None:
    tokenizer = merging(("Ċ", "u"))
    turns = [("user", "q"), ("assistant", "yo"), ("user", "r"), ("assistant", "so")]
    example = load_one(jsonl(tmp_path / "d.jsonl", conversation(*turns)), tokenizer)
    assert labelled(tokenizer, example) == " yo\nu so\n"


def test_an_answer_that_brings_its_end_and_a_newline_ends_at_its_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(LINES)
    path = jsonl(tmp_path / "d.jsonl", pair("q", "yo<|im_end|>\n"))
    assert labelled(tokenizer, load_one(path, tokenizer)).endswith("yo<|im_end|>")


def test_an_answer_that_its_template_rewrites_is_not_looked_for_in_a_later_turn(tmp_path: Path) -> None:
    joined = f"({CONTENT}.split() | join(' ') if message['role'] == 'assistant' else {CONTENT})"
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, joined))
    turns = [("user", "q"), ("assistant", "a  b"), ("user", "a  b"), ("assistant", "c")]
    example = load_one(jsonl(tmp_path / "d.jsonl", conversation(*turns)), tokenizer)
    assert labelled(tokenizer, example) == "a b<|im_end|>c<|im_end|>"


def test_an_answer_that_opens_with_the_thought_of_the_prompt_is_learned_to_its_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(LINES + "{% if add_generation_prompt %}assistant: <think>\n{% endif %}")
    path = jsonl(tmp_path / "d.jsonl", pair("q", "<think>\nx<|im_end|>y"))
    assert labelled(tokenizer, load_one(path, tokenizer)) == "x<|im_end|>y\n"


def test_conversations_that_say_the_same_have_the_prompt_of_the_first_answer_that_is_learned(tmp_path: Path) -> None:
    said = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    first, second = (conversation(*said) for _ in range(2))
    first["messages"][1]["weight"] = second["messages"][3]["weight"] = 0
    data = load(jsonl(tmp_path / "d.jsonl", first, second), tiny_tokenizer(CHATML), held_out_fraction=0)
    (example,) = data.train
    learned = next(position for position, label in enumerate(example.labels) if label != IGNORE)
    assert (example.prompt_length, example.question) == (learned, "q")


def test_a_tokenizer_without_an_end_writes_none(tmp_path: Path) -> None:
    tokenizer = merging()
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", "yo")), tokenizer)
    assert tokenizer.decode(example.input_ids) == "user: q\nassistant: yo\n"


def test_a_turn_that_a_template_writes_as_json_in_ascii_is_there(tmp_path: Path) -> None:
    in_ascii = f"({CONTENT} | tojson(ensure_ascii=true) if message['role'] == 'tool' else {CONTENT})"
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, in_ascii))
    turns = [("user", "q"), ("tool", "ü"), ("assistant", "a")]
    example = load_one(jsonl(tmp_path / "d.jsonl", conversation(*turns)), tokenizer)
    assert labelled(tokenizer, example) == "a<|im_end|>"


def test_a_template_that_writes_other_words_for_the_few_it_knows_leaves_nothing_out(tmp_path: Path) -> None:
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{% if m['content'] != 'fast' %}"
        "{{ raise_exception('fast?') }}{% endif %}effort: low\n"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    tokenizer = tiny_tokenizer(strict)
    turns = [("system", "fast"), ("user", "q"), ("assistant", "a")]
    example = load_one(jsonl(tmp_path / "d.jsonl", conversation(*turns)), tokenizer)
    assert labelled(tokenizer, example) == "a<|im_end|>"


def test_thoughts_of_an_earlier_answer_may_be_left_out(tmp_path: Path) -> None:
    """As Qwen3's template does with those before the last question."""
    shown = f"({CONTENT} if loop.last else {CONTENT}.split('</think>')[-1])"
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, shown))
    turns = [("user", "q"), ("assistant", "<think>so</think>thus"), ("user", "r"), ("assistant", "a")]
    record = conversation(*turns)
    record["messages"][1]["weight"] = 0
    assert labelled(tokenizer, load_one(jsonl(tmp_path / "d.jsonl", record), tokenizer)) == "a<|im_end|>"


def test_an_end_of_two_special_tokens_is_learned_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", "<|im_end|><|im_start|>"))
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", "a")), tokenizer)
    assert labelled(tokenizer, example) == "a<|im_end|><|im_start|>"


def test_a_template_that_adds_a_number_to_a_text_is_told_with_the_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("{{ messages[0]['content'] + 1 }}")
    path = jsonl(tmp_path / "d.jsonl", pair("q", "a"))
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: can only concatenate str"):
        load_one(path, tokenizer)


def test_a_question_as_long_as_its_template_shows_is_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"{CONTENT}[:20]"))
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q" * 20, "a")), tokenizer)
    assert labelled(tokenizer, example) == "a<|im_end|>"


def test_the_question_is_that_of_the_first_answer_that_is_learned(tmp_path: Path) -> None:
    record = conversation(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    record["messages"][1]["weight"] = 0
    assert load_one(jsonl(tmp_path / "d.jsonl", record), tiny_tokenizer(CHATML)).question == "r"


def test_a_first_answer_keeps_the_space_that_it_begins_with(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    example = load_one(jsonl(tmp_path / "d.jsonl", conversation(("assistant", " hi"))), tokenizer)
    assert labelled(tokenizer, example) == " hi<|im_end|>"


def test_what_a_question_says_does_not_stand_for_what_its_answer_lacks(tmp_path: Path) -> None:
    of_answers = f"({CONTENT}.split('</think>')[-1] if message['role'] == 'assistant' else {CONTENT})"
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, of_answers))
    said = "<think>so</think>thus"
    path = jsonl(tmp_path / "d.jsonl", pair(f"repeat: {said}", said))
    with pytest.raises(ValueError, match="leaves out some of an answer"):
        load_one(path, tokenizer)


def test_an_added_token_that_is_not_special_ends_no_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(LINES.replace("m['content']", "m['content'].split() | join(' ')"))
    tokenizer.add_tokens(["<tool>"])
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", "a  <tool>b")), tokenizer)
    assert labelled(tokenizer, example).endswith("a <tool>b\n")


def test_an_answer_that_begins_as_the_end_of_the_turns_before_it_is_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CONTENTS + "{% if not add_generation_prompt %}<|im_end|>{% endif %}")
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", "<b>")), tokenizer)
    assert labelled(tokenizer, example) == "<b>\n<|im_end|>"


def test_a_prompt_that_ends_in_thinking_is_cut_before_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<thinking>\n{% endif"))
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", "<b>")), tokenizer)
    assert labelled(tokenizer, example) == "<b><|im_end|>"


def test_an_answer_that_its_template_writes_as_json_is_learned_as_json(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"({CONTENT} | tojson)"))
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", 'ü "a"')), tokenizer)
    assert labelled(tokenizer, example) == '"ü \\"a\\""<|im_end|>'


def test_a_thought_that_the_question_ends_in_is_none_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CONTENTS + "{% if add_generation_prompt %}<think>\n{% endif %}")
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("what is <think>", "a tag")), tokenizer)
    assert labelled(tokenizer, example) == "a tag\n"


def test_an_answer_in_capitals_is_there_where_one_letter_becomes_two(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace(CONTENT, f"({CONTENT} | upper)"))
    example = load_one(jsonl(tmp_path / "d.jsonl", pair("q", "Straße")), tokenizer)
    assert labelled(tokenizer, example) == "STRASSE<|im_end|>"


def test_a_weight_of_null_is_none(tmp_path: Path) -> None:
    record = conversation(("user", "q"), ("assistant", "a"), weight=None, train=None)
    tokenizer = tiny_tokenizer(CHATML)
    assert labelled(tokenizer, load_one(jsonl(tmp_path / "d.jsonl", record), tokenizer)) == "a<|im_end|>"
