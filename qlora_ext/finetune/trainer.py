"""transformers.Trainer with the loss of this package.

A checkpoint is written beside its place and renamed, so a save cut short leaves nothing that --resume would take.
"""

import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from qlora_ext import save_adapter
from qlora_ext.adapters.files import WEIGHTS_FILE, resume_adapter
from qlora_ext.adapters.peft_config import CONFIG_FILE
from qlora_ext.whole_files import naming, to_disk

from .data import Dataset, PadToLongest
from .encode import IGNORE
from .evaluate import held_out_loss
from .load import load_model
from .loss import answer_loss
from .model_folder import ModelFolder
from .optimizer import OptimizerChoice, for_trainer, paged
from .output_folder import STAGING, checkpoints

KEPT_CHECKPOINTS = 2
PAGED_STATES = "optimizer.safetensors"
RANDOM_STATE = "rng_state.pth"
WRITER = re.compile("inline_container|PytorchStreamWriter|basic_ios")  # in every error of the file of torch.save


def check_states(checkpoint: Path, choice: OptimizerChoice) -> None:
    """Raise ValueError unless all is there that Trainer, without a word, would begin anew with."""
    for name in (OPTIMIZER_NAME if choice.kind == "adamw" else PAGED_STATES, SCHEDULER_NAME, RANDOM_STATE):
        _check_whole(checkpoint / name)


def check_weights(checkpoint: Path, *, adapter: bool) -> None:
    """Raise ValueError unless there is an adapter in a checkpoint, or else a model."""
    if adapter:
        files = [checkpoint / CONFIG_FILE, checkpoint / WEIGHTS_FILE]
    else:
        try:
            files = ModelFolder(checkpoint).files
        except ValueError as error:
            raise ValueError(f"{error}; {_instead(checkpoint)}") from error
    for file in files:
        _check_whole(file)


def unusable(file: Path, got: str) -> ValueError:
    """The error of what is missing or damaged in a checkpoint."""
    return ValueError(f"{file}: {got}; {_instead(file.parent)}")


def _instead(checkpoint: Path) -> str:
    return f"delete {checkpoint} and --resume goes on from the one before, if any"


def _check_whole(file: Path) -> None:
    if not file.is_file():
        raise unusable(file, "missing")
    if (file.suffix == ".safetensors" and not _opens(file)) or (file.suffix in (".pt", ".pth") and not _is_whole(file)):
        raise unusable(file, "damaged")


def _opens(file: Path) -> bool:
    try:
        safe_open(file, framework="pt")
    except SafetensorError:
        return False
    return True


def _is_whole(file: Path) -> bool:
    """Whether what is in a file of torch.save has its checksums, which torch.load does not look at."""
    damaged = (zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, OverflowError, RuntimeError, EOFError)
    with file.open("rb") as content:
        try:
            with zipfile.ZipFile(content) as archive:
                return archive.testzip() is None
        except damaged:
            return False


class AnswerTrainer(Trainer):
    """Trainer, but for the loss, the optimizer and what a checkpoint holds."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        args: TrainingArguments,
        optimizer: OptimizerChoice,
        *,
        loss_chunk: int | None,
        adapter: bool,
        autocast: bool,
    ) -> None:
        self.tuned, self.tokenizer, self.held_out = model, tokenizer, data.held_out
        self.loss_chunk, self.adapter, self.autocast = loss_chunk, adapter, autocast
        self.collate = PadToLongest(tokenizer.pad_token_id or 0)
        self.folder = Path(str(args.output_dir))
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            optimizer_cls_and_kwargs=for_trainer(optimizer, args),
        )
        self.model_accepts_loss_kwargs = True  # of any model: compute_loss leaves nothing for Trainer to divide

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The batches of a step, and its labelled tokens: for many models Trainer counts the first of each, or none."""
        batches: list[dict[str, Tensor]] = super().get_batch_samples(*args, **kwargs)[0]
        if not batches:
            return batches, None
        counts = [(batch["labels"][:, 1:] != IGNORE).sum() for batch in batches]
        return batches, torch.stack(counts).sum().to(self.args.device)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        _, batch = args
        # accelerate casts inside the model's forward alone; the head of a chunk is called outside it.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast):
            loss, _ = answer_loss(self.tuned, batch, self.loss_chunk)
        tokens: Tensor = kwargs["num_items_in_batch"]
        return loss / tokens

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        batch_size = self.args.per_device_train_batch_size
        how: dict[str, Any] = {"autocast": self.autocast, "chunk": self.loss_chunk}
        loss = held_out_loss(self.tuned, self.held_out, self.collate, batch_size, **how)
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = self.folder if output_dir is None else Path(output_dir)
        if self.adapter:
            save_adapter(self.tuned, folder)
            return
        with _staging(folder) as staging:
            self.tuned.save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)
            to_disk(staging)
            for file in staging.iterdir():
                if file.is_dir():  # of chat templates, and rename takes the place of none that has files
                    shutil.rmtree(folder / file.name, ignore_errors=True)
                os.replace(file, folder / file.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter:
            resume_adapter(self.tuned, resume_from_checkpoint, "default")
        else:
            # Trainer's own finds nothing that transformers' conversions rename in files. Host memory holds the weights
            # twice here, before it holds gradients.
            saved = load_model(
                ModelFolder(Path(resume_from_checkpoint)), dtype=self.tuned.dtype, device=torch.device("cpu")
            )
            self.tuned.load_state_dict(saved.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = paged(self.optimizer)
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer.save_states(Path(output_dir) / PAGED_STATES)  # state_dict() would hold all states in memory again
        scheduler: Any = self.lr_scheduler
        torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer = paged(self.optimizer)
        scheduler: Any = self.lr_scheduler
        if optimizer is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            optimizer.load_states(Path(checkpoint) / PAGED_STATES)
            scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        # The next rate came back as it was planned when it was saved: at the end of a schedule 0.
        groups = scheduler.optimizer.param_groups
        for group, lr, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = lr * factor(scheduler.last_epoch)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with _staging(self.folder) as staging:
            self.args.output_dir = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(self.folder)
            name = f"checkpoint-{self.state.global_step}"
            to_disk(staging / name)
            os.replace(staging / name, self.folder / name)
        for old in checkpoints(self.folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Where to write what goes into `folder` when it is whole; gone afterwards.

    Raises: OSError when it cannot be written: safetensors and torch.save say in other ways that a disk is full.
    """
    try:
        with naming(folder):
            yield folder / STAGING
    except RuntimeError as error:
        if not WRITER.search(str(error)):
            raise
        raise OSError(f"{folder}: not written, is the disk full? {error}") from error
    finally:
        shutil.rmtree(folder / STAGING, ignore_errors=True)
