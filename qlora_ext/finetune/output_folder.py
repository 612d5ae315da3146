"""The folder of a run: no two runs write into it at once, and none leaves products of another beside its own."""

import os
import re
import shutil
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from types import TracebackType

from qlora_ext.adapters.files import WEIGHTS_FILE
from qlora_ext.adapters.peft_config import CONFIG_FILE
from qlora_ext.whole_files import is_at, lock

LOCK = ".finetune.lock"
STAGING = ".incomplete"
# What a run writes, beside checkpoints and its reports.
ADAPTER = (CONFIG_FILE, WEIGHTS_FILE, "adapter_*.tmp")
MODEL = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
BESIDE_MODEL = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
REPORTS = ("report.json", "report.png")
RUN = "run.json"  # what --resume must not change
PARTIAL = (STAGING, f"{RUN}.*.tmp", "report.*.tmp")


def checkpoints(path: Path) -> list[Path]:
    """Those of a run, by their steps; a copy that someone has put aside under another name is none."""
    found = [each for each in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", each.name) and each.is_dir()]
    return sorted(found, key=lambda each: int(each.name.partition("-")[2]))


def newest_checkpoint(path: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return next(reversed(checkpoints(path)), None)


def earlier_run(path: Path) -> str | None:
    """What a run may not write beside unless it resumes or overwrites, and how to have it do so; None: nothing."""
    if checkpoints(path):
        return f"--output {path} holds an earlier run: add --resume or --overwrite"
    if any(path.glob("*.safetensors")):
        return f"--output {path} holds a model or an adapter: add --overwrite"
    return None


def _products(path: Path) -> list[Path]:
    """Checkpoints first: what --resume goes on from must not be of another run than run.json says."""
    beside = BESIDE_MODEL if _found(path, MODEL) else ()  # else they are somebody's own
    return [*checkpoints(path), *_found(path, (*ADAPTER, *MODEL, *beside, RUN, *REPORTS, *PARTIAL))]


def _found(path: Path, patterns: Iterable[str]) -> list[Path]:
    return [each for pattern in patterns for each in path.glob(pattern)]


class OutputFolder:
    """A context in which this process alone writes into `path`; the folder is made by `begin`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock: FileIO | None = None

    def __enter__(self) -> "OutputFolder":
        if self.path.is_dir():
            self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lock is not None:
            if is_at(self.path / LOCK, self.lock):
                (self.path / LOCK).unlink(missing_ok=True)  # first: another run takes only what has its name
            self.lock.close()

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or make room in it.

        Raises: ValueError when there is an earlier run, or another at work.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.lock is None:
            self._take()
        if not (resume or overwrite) and (reason := earlier_run(self.path)):  # one that began and ended meanwhile
            raise ValueError(reason)
        # Without --overwrite there is nothing of a run but, perhaps, its reports; other files are not its own.
        for product in _products(self.path) if overwrite else _found(self.path, REPORTS):
            if product.is_dir() and not product.is_symlink():
                shutil.rmtree(product)
            else:
                product.unlink()

    def _take(self) -> None:
        path = self.path / LOCK
        while self.lock is None:
            file = open(path, "ab", buffering=0, opener=_no_link)  # noqa: SIM115
            if not lock(file):
                file.close()
                raise ValueError(f"--output {self.path}: expected no other run in it, got one at work")
            if is_at(path, file):
                self.lock = file
            else:
                file.close()  # of a run that has just ended


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
