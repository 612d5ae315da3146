from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_data import jsonl, labelled, load, load_one
from tiny_model import CHATML, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_ext.finetune.data import Dataset, PadToLongest
from qlora_ext.finetune.encode import IGNORE, Example


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def pair(index: int) -> dict[str, str]:
    return {"prompt": f"question {index}", "response": f"answer {index}"}


def test_loss_is_on_the_answer_and_its_end_of_turn_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    example = load_one(jsonl(tmp_path / "d.jsonl", {"prompt": "hé?", "response": "ja ✓"}), tokenizer)
    text = "<|im_start|>user\nhé?<|im_end|>\n<|im_start|>assistant\nja ✓<|im_end|>\n"
    assert tokenizer.decode(example.input_ids) == text
    assert labelled(tokenizer, example) == "ja ✓<|im_end|>"
    assert all(label in (IGNORE, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    assert tokenizer.decode(example.input_ids[: example.prompt_length]).endswith("<|im_start|>assistant\n")
    assert example.question == "hé?"


def test_every_assistant_turn_has_loss_and_no_other_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]
    example = load_one(jsonl(tmp_path / "d.jsonl", {"messages": messages}), tokenizer)
    assert labelled(tokenizer, example) == "assistant 2<|im_end|>assistant 4<|im_end|>"
    assert example.question == "user 1"


@pytest.mark.parametrize(("template", "text"), [(CHATML, "hi <|im_end|>"), (None, " hi <|im_end|>")])
def test_conversation_may_begin_with_the_assistant(tmp_path: Path, template: str | None, text: str) -> None:
    tokenizer = tiny_tokenizer(template)
    turns = [("assistant", "hi "), ("user", "hi"), ("assistant", "bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    example = load_one(jsonl(tmp_path / "d.jsonl", {"messages": messages}), tokenizer)
    assert labelled(tokenizer, example) == text + ("bye<|im_end|>" if template else " bye<|im_end|>")
    assert tokenizer.decode(example.input_ids[: example.prompt_length]).endswith("assistant\n" if template else ":")
    assert example.question == ""


def test_text_of_the_template_in_a_first_answer_is_no_border(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for said in ("m_e", "end", "assistant", "  "):
        messages = [{"role": "assistant", "content": said}]
        example = load_one(jsonl(tmp_path / "d.jsonl", {"messages": messages}), tokenizer)
        assert labelled(tokenizer, example) == f"{said}<|im_end|>"


THOUGHT = {"<think>\n": "a", "<think>\n\n</think>\n\n": "<b>a"}


@pytest.mark.parametrize("ending", THOUGHT, ids=["thinks", "does not think"])
def test_prompt_that_ends_in_a_thought_is_cut_before_it(tmp_path: Path, ending: str) -> None:
    tokenizer = tiny_tokenizer(CHATML.replace("assistant\n{% endif", f"assistant\n{ending}{{% endif"))
    record = {"prompt": "q", "response": THOUGHT[ending]}
    example = load_one(jsonl(tmp_path / "d.jsonl", record), tokenizer)
    assert labelled(tokenizer, example) == f"{THOUGHT[ending]}<|im_end|>"
    thought = {"prompt": "q", "response": f"{ending}a"}
    assert labelled(tokenizer, load_one(jsonl(tmp_path / "d.jsonl", thought), tokenizer)) == "a<|im_end|>"


def test_tags_of_a_template_are_no_thought(tmp_path: Path) -> None:
    tags = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    tokenizer = tiny_tokenizer(tags + "{% if add_generation_prompt %}<assistant>\n{% endif %}")
    record = {"prompt": "what is <b>", "response": "a"}
    example = load_one(jsonl(tmp_path / "d.jsonl", record), tokenizer)
    assert labelled(tokenizer, example) == "<assistant>a</assistant>", "what follows the user's turn"


def test_first_turn_that_the_template_changes_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"messages": [{"role": "assistant", "content": "hi"}]})
    template = CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: the chat template rewrites the first turn"):
        load_one(path, tiny_tokenizer(template))
    only = load_one(path, tiny_tokenizer("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"))
    assert only.prompt_length == 1, "what a sample answer starts from"


def test_empty_system_turn_is_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    plain = {"messages": turns}
    with_empty = {"messages": [{"role": "system", "content": ""}, *turns]}
    data = load(jsonl(tmp_path / "d.jsonl", plain, with_empty), tokenizer, held_out_fraction=0)
    assert (len(data.train), data.duplicates) == (1, 1)


def test_answer_of_weight_0_is_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns: list[dict[str, Any]] = [{"role": "user", "content": "q", "weight": 0}]
    turns += [{"role": "assistant", "content": f"answer {weight}", "weight": weight} for weight in (0, 1)]
    example = load_one(jsonl(tmp_path / "d.jsonl", {"messages": turns}), tokenizer)
    assert labelled(tokenizer, example) == "answer 1<|im_end|>"
    assert "answer 0<|im_end|>" in tokenizer.decode(example.input_ids[: example.prompt_length])
    data = load(jsonl(tmp_path / "d.jsonl", pair(0), {"messages": turns[:2]}), tokenizer, held_out_fraction=0)
    assert (len(data.train), data.dropped) == (1, 1)


def test_fields_that_say_nothing_here_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "q", "name": "bob"}, {"role": "assistant", "content": "a", "tool_calls": None}]
    records = [{**pair(0), "id": 7, "tools": [], "weight": 1}, {"messages": turns, "prompt": "q", "source": "web"}]
    data = load(jsonl(tmp_path / "d.jsonl", *records), tokenizer, held_out_fraction=0)
    assert data.unread == ("id", "name", "prompt", "source")


@pytest.mark.parametrize("template", [None, CHATML], ids=["no template", "template set aside"])
def test_plain_conversation(tmp_path: Path, template: str | None) -> None:
    tokenizer = tiny_tokenizer(template)
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "hi", "response": "yo"})
    example = load_one(data, tokenizer, use_chat_template=template is None)
    assert tokenizer.decode(example.input_ids) == "user: hi\nassistant: yo<|im_end|>\n"
    assert labelled(tokenizer, example) == " yo<|im_end|>"


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] if loop.last else '-' }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: the chat template rewrites earlier turns: .*--chat plain"):
        load_one(jsonl(tmp_path / "d.jsonl", pair(0)), tiny_tokenizer(template))
    shown = "message['content'] if loop.last or message['role'] == 'user' else '-'"
    last = tiny_tokenizer(CHATML.replace("message['content']", shown))
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ValueError, match="give one assistant turn, the last, per example, or --chat plain"):
        load_one(jsonl(tmp_path / "d.jsonl", {"messages": messages}), last)


def test_error_of_the_template_names_the_line(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system turn here') }}"
    with pytest.raises(ValueError, match=r"d\.jsonl, line 1: no system turn here"):
        load_one(jsonl(tmp_path / "d.jsonl", pair(0)), tiny_tokenizer(template))


def test_text_is_packed_into_windows_with_loss_on_all(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(chr(ord("a") + index % 26) + str(index) for index in range(100)) + "é\n"
    (tmp_path / "d.txt").write_text(text, encoding="utf-8")
    data = load(tmp_path / "d.txt", tokenizer, max_length=32, held_out_fraction=0.2, seed=1)
    windows = data.train + data.held_out
    assert all(window.labels == window.input_ids for window in windows)
    expected = tokenizer(text)["input_ids"]
    assert sorted(w.input_ids for w in windows) == sorted(expected[i : i + 32] for i in range(0, len(expected), 32))
    rest = len(expected) % 32  # of a short window half of it is the prompt
    assert sorted({(len(w.input_ids), w.prompt_length) for w in windows}) == [(rest, rest // 2), (32, 16)]
    assert 1 < rest < 32


def test_a_window_counts_once_and_one_of_one_token_not(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "d.txt").write_text("a" * 32 * 4 + "b")
    data = load(tmp_path / "d.txt", tokenizer, max_length=32, held_out_fraction=0)
    assert (len(data.train), data.duplicates, data.truncated, data.dropped) == (1, 3, 0, 1)


def test_duplicates_go_before_the_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    as_messages = {
        "messages": [{"role": "user", "content": "question 0"}, {"role": "assistant", "content": "answer 0"}]
    }
    records = [pair(index % 20) for index in range(60)] + [as_messages]
    data = load(jsonl(tmp_path / "d.jsonl", *records), tokenizer, held_out_fraction=0.24)  # of 20, 4.8
    assert (len(data.train), len(data.held_out), data.duplicates) == (15, 5, 41)
    assert len({tuple(example.input_ids) for example in data.train + data.held_out}) == 20


def test_conversations_that_say_the_same_are_one_with_all_that_is_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    said = [("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two"), ("assistant", "three")]

    def record(*weights: int) -> dict[str, Any]:
        of_answers = iter(weights)
        turns = [{"role": role, "content": content} for role, content in said]
        return {"messages": [t | {"weight": next(of_answers)} if t["role"] == "assistant" else t for t in turns]}

    path = jsonl(tmp_path / "d.jsonl", record(1, 0, 0), record(0, 0, 1))
    data = load(path, tokenizer, held_out_fraction=0)
    assert (len(data.train), data.duplicates) == (1, 1)
    assert labelled(tokenizer, data.train[0]) == "one<|im_end|>three<|im_end|>"


def test_split_depends_on_the_seed_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "d.jsonl", *map(pair, range(30)))

    def split(seed: int) -> Dataset:
        torch.manual_seed(torch.seed())
        return load(path, tokenizer, seed=seed)

    assert split(3) == split(3)
    assert split(3).held_out != split(4).held_out


def test_truncation_keeps_the_left_and_drops_what_has_no_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [pair(0), {"prompt": "q" * 100, "response": "lost"}, {"prompt": "q", "response": "a" * 100}]
    path = jsonl(tmp_path / "d.jsonl", *records)
    data = load(path, tokenizer, max_length=60, held_out_fraction=0)
    assert (len(data.train), data.truncated, data.dropped) == (2, 2, 1)
    cut = max(data.train, key=lambda example: len(example.input_ids))
    assert len(cut.input_ids) == len(cut.labels) == 60
    assert labelled(tokenizer, cut) == "a" * (60 - cut.prompt_length)
    with pytest.raises(ValueError, match="no example has a token to learn within 8 tokens"):
        load(path, tokenizer, max_length=8)


def test_one_example_cannot_be_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "d.jsonl", pair(0))
    with pytest.raises(ValueError, match=r"1 example\(s\) are too few to hold out 0\.1"):
        load(path, tokenizer)
    assert len(load(path, tokenizer, held_out_fraction=0).train) == 1


BAD_LINES = {
    "{": r"expected JSON \(Expecting .*, column 2\)",
    "[1]": "expected a JSON object, got an array",
    "7": "expected a JSON object, got a number",
    "null": "expected a JSON object, got null",
    '{"prompt": "a", "completion": "b"}': 'expected fields "prompt" and "response", or "messages", got "prompt", "comp',
    "{}": 'expected fields "prompt" and "response", or "messages", got no field',
    '{"prompt": "a", "response": 3}': 'expected "response" to be a non-empty string, got a number',
    '{"prompt": true, "response": "a"}': 'expected "prompt" to be a non-empty string, got a boolean',
    '{"prompt": "", "response": "a"}': 'expected "prompt" to be a non-empty string, got ""',
    '{"messages": {}}': 'expected "messages" to be an array, got an object',
    '{"messages": []}': 'expected a message whose "role" is "assistant", got none',
    '{"messages": ["a"]}': r"expected messages\[0\] to be an object, got a string",
    '{"messages": [{"role": "assistant"}]}': 'expected a field "content", got "role"',
    '{"messages": [{"role": "user", "content": ""}]}': 'expected "content" to be a non-empty string, got ""',
    '{"prompt": "a", "response": "\\ud800"}': r"expected \"response\" to be Unicode text, got half a .*'\\ud800'",
    '{"prompt": "a", "response": "b", "system": "c"}': '.* role "system", got the field "system"',
    '{"prompt": "a", "response": "b", "weight": 0}': 'expected an example without it, got the field "weight"',
    '{"prompt": "a", "response": "b", "context": "c"}': 'expected an example without it, got the field "context"',
    '{"messages": [{"role": "assistant", "content": "a"}], "response": "b"}': 'expected .* got the field "response"',
    '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}': 'expected .* got the field "tool_calls"',
    '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}': 'expected "weight" to be 0 or 1, got 0.5',
    '{"messages": [{"role": "user", "content": "a", "weight": 1}]}': 'expected no "weight" but 0 .*"user", got 1',
    "[" * 100_000: "expected JSON of few levels, got it nested too deep",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_bad_line_is_named(line: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(pair(0)) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"d\.jsonl, line 3: " + BAD_LINES[line]):
        load(path, tokenizer)


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_bad_bytes_and_empty_files(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n\xff\n')
    with pytest.raises(ValueError, match=name + ", line 2: expected UTF-8 text"):
        load(path, tokenizer)
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match=name + ": the file is empty"):
        load(path, tokenizer)


def test_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(pair(0)).encode())
    assert load_one(path, tokenizer).question == "question 0"


def test_padding_is_marked_by_length_and_not_by_id(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    long, short = Example([5, 6, 7, end], [IGNORE, 6, 7, end], 1, ""), Example([8, end], [IGNORE, end], 1, "")
    batch = PadToLongest(end)([long, short])
    assert batch["input_ids"].tolist() == [[5, 6, 7, end], [8, end, end, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, end], [IGNORE, end, IGNORE, IGNORE]]
