"""The folder of a run: no two runs write into it at once, and none leaves products of another beside its own."""

import contextlib
import errno
import fcntl
import os
import shutil
from io import FileIO
from pathlib import Path
from types import TracebackType

LOCK = ".finetune.lock"
STAGING = ".incomplete"
# All that a run writes. Checkpoints go first: what --resume goes on from must not be of another run than run.json says.
PRODUCTS = (
    *("checkpoint-*", STAGING),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_*.tmp"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("run.json", "report.json", "report.png", ".run.json", ".report.json", ".report.png"),
)


def earlier_run(path: Path) -> str | None:
    """What a run may not write beside unless it resumes or overwrites, and how to have it do so; None: nothing."""
    if any(path.glob("checkpoint-*")):
        return f"--output {path} holds an earlier run: add --resume or --overwrite"
    if any(path.glob("*.safetensors")):
        return f"--output {path} holds a model or an adapter: add --overwrite"
    return None


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files beside their places, then rename all: none is ever half written, nor there without the others."""
    partial = {name: folder / f".{name}" for name in contents}
    try:
        for name, content in contents.items():
            partial[name].write_bytes(content)
        for name in contents:
            os.replace(partial[name], folder / name)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk is not told by name
            error.filename = str(folder)
        raise
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


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
        for pattern in PRODUCTS if overwrite else ("report.json", "report.png"):
            for product in self.path.glob(pattern):
                if product.is_dir() and not product.is_symlink():
                    shutil.rmtree(product)
                else:
                    product.unlink()

    def _take(self) -> None:
        path = self.path / LOCK
        while self.lock is None:
            file = open(path, "ab", buffering=0)  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):  # where there are no locks
                    file.close()
                    raise ValueError(f"--output {self.path}: expected no other run in it, got one at work") from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), os.fstat(file.fileno())):
                    self.lock = file
                    return
            file.close()  # of a run that has just ended
