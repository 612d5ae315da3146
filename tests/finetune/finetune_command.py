"""The command line of finetune on a tiny model, as fixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "aaaa"}) + "\n" for i in range(30)))
    return path


@pytest.fixture
def arguments(model: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    short = {"steps": 3, "batch-size": 4, "samples": 2, "eval-examples": 2, "lr": 1e-2}
    return {"model": model, "data": data, "method": "qlora", "output": tmp_path / "out", **short}


def words(arguments: dict[str, Any]) -> list[str]:
    """{"steps": 3, "resume": True} -> ["--steps", "3", "--resume"]; None leaves an option out."""
    pairs = [(f"--{name}", value) for name, value in arguments.items() if value is not None]
    return [word for name, value in pairs for word in ([name] if value is True else [name, str(value)])]
