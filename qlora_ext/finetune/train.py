"""The training run: transformers.Trainer with checkpoints that hold the adapter and never the base.

A checkpoint is written beside its place and renamed, so a save cut short leaves nothing that --resume would take.
Ctrl-C lets the running step end, then saves; a second Ctrl-C stops at once.
"""

import logging
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

import qlora_ext

from .callbacks import Interrupt, Watch
from .data import Dataset, PadToLongest
from .evaluate import held_out_loss
from .loss import answer_loss
from .optimizer import OptimizerChoice, StatesReport, for_trainer, paged, where_states_are

STAGING = ".incomplete"
PAGED_STATES = "optimizer.safetensors"
# Resuming with other --save-steps, Trainer warns that it keeps the old ones; Watch.on_train_begin sets the new.
DIFFERS = "do not match the ones in the `trainer_state.json`"
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: DIFFERS not in record.getMessage())


@dataclass(frozen=True)
class Schedule:
    """How to train: one optimizer step takes `batch_size * accumulate` examples."""

    steps: int
    batch_size: int
    accumulate: int
    lr: float
    kind: str  # linear, cosine or constant
    warmup: float  # steps, or a share of all steps when below 1
    eval_steps: int  # 0: no held-out loss during training
    save_steps: int
    seed: int
    gradient_checkpointing: bool
    loss_chunk: int | None  # tokens whose logits exist together; None: all
    optimizer: OptimizerChoice


@dataclass(frozen=True)
class Outcome:
    """What a run measured; seconds and tokens are of this process's own steps, losses of the whole run."""

    step: int
    interrupted: bool
    losses: list[float]
    held_out: list[tuple[int, float]]  # (step, loss) seen during training
    tokens: int  # input tokens without padding
    seconds: float  # inside steps: forward, backward and optimizer, without evaluation and saving
    gradient_bytes: int
    optimizer: StatesReport


def total_steps(examples: int, epochs: float, batch_size: int, accumulate: int) -> int:
    """Optimizer steps in `epochs` passes over `examples`; the last batch of a pass may be short."""
    return math.ceil(epochs * math.ceil(math.ceil(examples / batch_size) / accumulate))


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the highest step in `output`, or None."""
    found = get_last_checkpoint(output) if output.is_dir() else None
    return Path(found) if found else None


def saved_state(checkpoint: Path) -> TrainerState:
    """Read how far a checkpoint's run was; ValueError when its file is damaged."""
    file = checkpoint / TRAINER_STATE_NAME
    try:
        state: TrainerState = TrainerState.load_from_json(str(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected the state of a run, got a damaged file ({error})") from error
    if checkpoint.name != f"checkpoint-{state.global_step}":
        raise ValueError(f"{file}: expected the state of {checkpoint.name}, got global_step {state.global_step!r}")
    return state


def discard_checkpoints(output: Path) -> None:
    """Delete the checkpoints of an earlier run."""
    for stale in output.glob("checkpoint-*"):
        shutil.rmtree(stale)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    schedule: Schedule,
    output: Path,
    *,
    adapter: bool,
    autocast: bool = False,
    resume: bool = False,
) -> Outcome:
    """Train the parameters that require a gradient and save them into `output`.

    Args:
        adapter: save and load the adapter "default" only; False saves the whole model.
        autocast: bfloat16 computation from float32 weights.
        resume: go on from the newest checkpoint in `output`; without it, no checkpoint may be there.

    Raises: ValueError when the loss is not finite, or when there is nothing to resume.
    """
    checkpoint = newest_checkpoint(output) if resume else None
    if resume and checkpoint is None:
        raise ValueError(f"{output}: expected a checkpoint to resume from, got none")
    if (output / STAGING).exists():
        shutil.rmtree(output / STAGING)

    arguments = _arguments(schedule, output, model.device, autocast)
    trainer = _Trainer(model, tokenizer, data, arguments, schedule, adapter=adapter, autocast=autocast)
    trainer.remove_callback(PrinterCallback)
    watch, interrupt = Watch(), Interrupt()
    trainer.add_callback(watch)
    trainer.add_callback(interrupt)

    states = StatesReport()
    done = saved_state(checkpoint) if checkpoint else None
    if done is not None and done.global_step >= schedule.steps:
        trainer._load_from_checkpoint(str(checkpoint))  # Trainer would take one step too many
        trainer.state = done
    else:
        previous = signal.signal(signal.SIGINT, interrupt.ask)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            states = where_states_are(trainer.optimizer)
        except UnpicklingError as error:
            expected = "training state of plain values and tensors"
            raise ValueError(f"{checkpoint}: expected {expected}, got something else, not loaded") from error
        finally:
            signal.signal(signal.SIGINT, previous)
            if optimizer := paged(trainer.optimizer):
                optimizer.release()  # now, not with the last reference: the page file must not outlive the run
    trainer.save_model()

    history = trainer.state.log_history
    return Outcome(
        step=trainer.state.global_step,
        interrupted=interrupt.asked,
        losses=[entry["loss"] for entry in history if "loss" in entry],
        held_out=[(int(entry["step"]), entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        tokens=watch.tokens,
        seconds=watch.seconds,
        gradient_bytes=watch.gradient_bytes,
        optimizer=states,
    )


def _arguments(schedule: Schedule, output: Path, device: torch.device, autocast: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.lr,
        lr_scheduler_type="constant_with_warmup" if schedule.kind == "constant" else schedule.kind,
        warmup_steps=_warmup_steps(schedule),
        optim="adamw_torch",
        seed=schedule.seed,
        bf16=autocast,
        use_cpu=device.type == "cpu",
        activation_checkpointing=schedule.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps" if schedule.eval_steps else "no",
        eval_steps=schedule.eval_steps or None,
        save_strategy="steps",
        save_steps=schedule.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        disable_tqdm=True,  # Watch has the bar, with the loss in it
        report_to="none",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer wraps the model in DataParallel, which its docs advise against
    return arguments


def _warmup_steps(schedule: Schedule) -> int:
    """A share leaves at least one step: the first of a warmup has a learning rate of 0."""
    if schedule.warmup >= 1:
        return int(schedule.warmup)
    return min(math.ceil(schedule.warmup * schedule.steps), schedule.steps - 1)


class _Trainer(Trainer):
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        args: TrainingArguments,
        schedule: Schedule,
        *,
        adapter: bool,
        autocast: bool,
    ) -> None:
        self.tuned, self.tokenizer, self.held_out = model, tokenizer, data.held_out
        self.loss_chunk, self.adapter, self.autocast = schedule.loss_chunk, adapter, autocast
        self.collate = PadToLongest(tokenizer.pad_token_id or 0)
        self.folder = Path(str(args.output_dir))
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            optimizer_cls_and_kwargs=for_trainer(schedule.optimizer, args),
        )

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        _, batch = args
        loss, tokens = answer_loss(self.tuned, batch, self.loss_chunk)
        total = kwargs["num_items_in_batch"]  # labelled tokens of all forward passes of this step
        return loss / (tokens if total is None else total)

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
            qlora_ext.save_adapter(self.tuned, folder)
            return
        staging = folder / STAGING
        self.tuned.save_pretrained(staging)
        self.tokenizer.save_pretrained(staging)
        for file in staging.iterdir():
            os.replace(file, folder / file.name)
        staging.rmdir()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter:
            qlora_ext.load_adapter(self.tuned, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = paged(self.optimizer)
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer.save_states(Path(output_dir) / PAGED_STATES)  # state_dict() would hold all states in memory again
        scheduler: Any = self.lr_scheduler
        torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = paged(self.optimizer)
        if optimizer is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer.load_states(Path(checkpoint) / PAGED_STATES)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        staging = self.folder / STAGING
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(self.folder)
        name = f"checkpoint-{self.state.global_step}"
        os.replace(staging / name, self.folder / name)
        staging.rmdir()
        rotate_checkpoints(str(self.folder), self.args.save_total_limit)
