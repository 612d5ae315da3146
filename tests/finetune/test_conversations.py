"""What a line of data says beside its conversation: refused where it would change what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_ext.finetune.conversations import Turn, read_conversations

PAIR = {"prompt": "q", "response": "a"}
OF_EXAMPLES = (
    *("system_prompt", "instruction", "input", "context", "history", "tools", "functions", "weight"),
    *("chat_template_kwargs", "images", "videos", "audios", "documents"),
)
OF_MESSAGES = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("images", "videos", "audios"),
)


def read(path: Path, record: dict[str, Any]) -> tuple[tuple[Turn, ...], set[str]]:
    path.write_text(json.dumps(record), encoding="utf-8")
    unread: set[str] = set()
    ((_, turns),) = read_conversations(path, unread)
    return turns, unread


def with_messages(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **fields}]}


@pytest.mark.parametrize("value", ["x", 0, 2], ids=str)
def test_fields_that_would_change_what_is_learned_are_refused(value: Any, tmp_path: Path) -> None:
    records = [(field, record | {field: value}) for field in OF_EXAMPLES for record in (PAIR, with_messages())]
    for field, record in records + [(field, with_messages(**{field: value})) for field in OF_MESSAGES]:
        with pytest.raises(ValueError, match=f'line 1: .*got the field "{field}", which is not read'):
            read(tmp_path / "d.jsonl", record)


@pytest.mark.parametrize("value", [None, "", [], {}, False], ids=str)
def test_fields_that_hold_nothing_are_none(value: Any, tmp_path: Path) -> None:
    turns = (Turn("user", "q", False), Turn("assistant", "a", True))
    fields = [field for field in OF_EXAMPLES if field != "weight" or value is not False]
    for record in [PAIR | {field: value} for field in fields] + [
        with_messages(**{field: value}) for field in OF_MESSAGES
    ]:
        assert read(tmp_path / "d.jsonl", record) == (turns, set())


def test_what_is_meant_without_it_may_be_said(tmp_path: Path) -> None:
    turns = read(tmp_path / "d.jsonl", with_messages(train=True, weight=1) | {"weight": 1, "id": 7})
    assert turns == ((Turn("user", "q", False), Turn("assistant", "a", True)), {"id"})
    with pytest.raises(ValueError, match='got the field "weight"'):  # false, as 0, is no weight of 1
        read(tmp_path / "d.jsonl", PAIR | {"weight": False})


@pytest.mark.parametrize("fields", [{"train": False}, {"train": 0}, {"weight": 1, "train": False}], ids=str)
def test_an_answer_that_is_not_to_be_learned_is_context(fields: dict[str, Any], tmp_path: Path) -> None:
    turns, unread = read(tmp_path / "d.jsonl", with_messages(**fields))
    assert turns == (Turn("user", "q", False), Turn("assistant", "a", False))
    assert not unread
