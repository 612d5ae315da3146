"""Conversations from JSONL, one a line; what a line says beside them is refused where it would mean something."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Fields that would change what is learned, were they read; any others (id, source, ...) are only counted.
MEANT_FOR_EXAMPLE = (
    *("system", "system_prompt", "instruction", "input", "context", "history"),
    *("tools", "functions", "weight", "chat_template_kwargs"),
    *("images", "videos", "audios", "documents"),
)
MEANT_FOR_MESSAGE = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("images", "videos", "audios"),
)
LEARNED = ("weight", "train")  # of a message: 0 or false, if an answer is only context


class Turn(NamedTuple):
    """What one has said; `learned` is False for an answer that is only context."""

    role: str
    content: str
    learned: bool


Conversation = tuple[Turn, ...]


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line; ValueError naming the line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected UTF-8 text, got {error.reason}") from error


def read_conversations(path: Path, unread: set[str]) -> Iterator[tuple[int, Conversation]]:
    """Yield (line number, turns); ValueError naming the line that is no conversation, or says more than is read.

    Args:
        unread: gets the names of fields that say nothing here.
    """
    empty = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        empty = False
        try:
            yield number, _conversation(json.loads(line.rstrip()), unread)
        except json.JSONDecodeError as error:
            reason = f"{error.msg}, column {error.colno}"
            raise ValueError(f"{path}, line {number}: expected JSON ({reason})") from error
        except RecursionError as error:
            raise ValueError(f"{path}, line {number}: expected JSON of few levels, got it nested too deep") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if empty:
        raise ValueError(f"{path}: the file is empty")


def _conversation(record: Any, unread: set[str]) -> Conversation:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {_kind(record)}")
    if "messages" not in record:
        if "prompt" not in record or "response" not in record:
            raise ValueError(f'expected fields "prompt" and "response", or "messages", got {_fields(record)}')
        prompt, response = _text(record, "prompt"), _text(record, "response")
        _check_others(record, ("prompt", "response"), MEANT_FOR_EXAMPLE, unread)
        return (Turn("user", prompt, False), Turn("assistant", response, True))
    messages = record["messages"]
    if not isinstance(messages, list):
        raise ValueError(f'expected "messages" to be an array, got {_kind(messages)}')
    _check_others(record, ("messages",), (*MEANT_FOR_EXAMPLE, "response"), unread)
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"expected messages[{index}] to be an object, got {_kind(message)}")
        _check_others(message, ("role", "content", *LEARNED), MEANT_FOR_MESSAGE, unread)
    # An empty system turn, common in public data, says nothing.
    spoken = [m for m in messages if (m.get("role"), m.get("content")) != ("system", "")]
    turns = tuple(_turn(message) for message in spoken)
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError('expected a message whose "role" is "assistant", got none')
    return turns


def _turn(message: dict[str, Any]) -> Turn:
    role, content = _text(message, "role"), _text(message, "content")
    answers = role == "assistant"
    given = {field: message[field] for field in LEARNED if message.get(field) is not None}
    for field, value in given.items():
        if value not in ((0, 1) if answers else (0,)):
            expected = f'"{field}" to be 0 or 1' if answers else f'no "{field}" but 0 of the role "{role}"'
            raise ValueError(f"expected {expected}, got {json.dumps(value)}")
    return Turn(role, content, answers and all(given.values()))


def _check_others(given: dict[str, Any], read: tuple[str, ...], meant: tuple[str, ...], unread: set[str]) -> None:
    for field in given:
        if field in read:
            continue
        if field not in meant:
            unread.add(field)
        elif not _is_nothing(field, given[field]):
            advice = 'a message of the role "system"' if field == "system" else "an example without it"
            raise ValueError(f'expected {advice}, got the field "{field}", which is not read')


def _is_nothing(field: str, value: Any) -> bool:
    if value in (None, "", [], {}):
        return True
    return value == 1 if field == "weight" else value is False


def _text(record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise ValueError(f'expected a field "{field}", got {_fields(record)}')
    value = record[field]
    if not isinstance(value, str) or not value:
        raise ValueError(f'expected "{field}" to be a non-empty string, got {_kind(value)}')
    if surrogate := re.search(r"[\ud800-\udfff]", value):
        raise ValueError(f'expected "{field}" to be Unicode text, got half a character: {surrogate[0]!a}')
    return value


def _fields(record: dict[str, Any]) -> str:
    return ", ".join(map(json.dumps, record)) or "no field"


def _kind(value: Any) -> str:
    if value is None or value == "":
        return json.dumps(value)
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")
