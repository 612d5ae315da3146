"""The training run: transformers.Trainer with checkpoints that hold the adapter and never the base.

A checkpoint is written beside its place and renamed, so a save cut short leaves nothing that --resume would take.
Ctrl-C lets the running step end, then saves; a second Ctrl-C stops at once.
"""

import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

import qlora_ext

from .data import Dataset, PadToLongest
from .evaluate import held_out_loss
from .loss import answer_loss

STAGING = ".incomplete"


@dataclass(frozen=True)
class Schedule:
    """How to train: one optimizer step takes `batch_size * accumulate` examples."""

    steps: int
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    kind: str = "linear"  # linear, cosine or constant
    warmup: float = 0.03  # steps, or a share of all steps when below 1
    eval_steps: int = 0  # 0: no held-out loss during training
    save_steps: int = 100
    seed: int = 0
    gradient_checkpointing: bool = False
    loss_chunk: int | None = None  # tokens whose logits exist together; None: all


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
    optimizer_bytes: int


def total_steps(examples: int, epochs: float, batch_size: int, accumulate: int) -> int:
    """Optimizer steps in `epochs` passes over `examples`; the last batch of a pass may be short."""
    return math.ceil(epochs * math.ceil(math.ceil(examples / batch_size) / accumulate))


def newest_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the highest step in `output`, or None."""
    found = get_last_checkpoint(output) if output.is_dir() else None
    return Path(found) if found else None


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
        resume: go on from the newest checkpoint in `output`; without it checkpoints there are deleted first.

    Raises: ValueError when the loss is not finite, or when there is nothing to resume.
    """
    checkpoint = newest_checkpoint(output)
    if resume and checkpoint is None:
        raise ValueError(f"{output}: expected a checkpoint to resume from, got none")
    for pattern in [STAGING] if resume else [STAGING, "checkpoint-*"]:
        for stale in output.glob(pattern):
            shutil.rmtree(stale)

    arguments = _arguments(schedule, output, model.device, autocast)
    trainer = _Trainer(model, tokenizer, data, arguments, schedule.loss_chunk, adapter=adapter, autocast=autocast)
    trainer.remove_callback(PrinterCallback)
    watch, interrupt = _Watch(), _Interrupt()
    trainer.add_callback(watch)
    trainer.add_callback(interrupt)

    done = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if resume and checkpoint else None
    if done is not None and done.global_step >= schedule.steps:
        trainer._load_from_checkpoint(str(checkpoint))  # Trainer would take one step too many
        trainer.state = done
    else:
        previous = signal.signal(signal.SIGINT, interrupt.ask)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
        except UnpicklingError as error:
            expected = "training state of plain values and tensors"
            raise ValueError(f"{checkpoint}: expected {expected}, got something else, not loaded") from error
        finally:
            signal.signal(signal.SIGINT, previous)
    trainer.save_model()

    history = trainer.state.log_history
    optimizer_state = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    return Outcome(
        step=trainer.state.global_step,
        interrupted=interrupt.asked,
        losses=[entry["loss"] for entry in history if "loss" in entry],
        held_out=[(int(entry["step"]), entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        tokens=watch.tokens,
        seconds=watch.seconds,
        gradient_bytes=watch.gradient_bytes,
        optimizer_bytes=sum(
            value.nbytes for state in optimizer_state for value in state.values() if isinstance(value, Tensor)
        ),
    )


def _arguments(schedule: Schedule, output: Path, device: torch.device, autocast: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.lr,
        lr_scheduler_type="constant_with_warmup" if schedule.kind == "constant" else schedule.kind,
        warmup_steps=schedule.warmup,
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
        disable_tqdm=True,  # _Watch has the bar, with the loss in it
        report_to="none",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer wraps the model in DataParallel, which its docs advise against
    return arguments


class _Trainer(Trainer):
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        args: TrainingArguments,
        loss_chunk: int | None,
        *,
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


class _Watch(TrainerCallback):
    """The progress bar, the clock, and the check that the loss is a number."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.gradient_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens_before = state.num_input_tokens_seen
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=0.5)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gradient_bytes == 0:
            self.gradient_bytes = sum(p.grad.nbytes for p in kwargs["model"].parameters() if p.grad is not None)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", file=sys.stderr)
        if "loss" not in logs:
            return
        # The loss was just read from the device, so the step has ended there too.
        self.seconds += time.perf_counter() - self.started
        self.tokens = state.num_input_tokens_seen - self.tokens_before
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        self.bar.update()
        if not math.isfinite(logs["loss"]):
            self.bar.close()
            raise ValueError(f"the loss is {logs['loss']} at step {state.global_step}: try a lower learning rate")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class _Interrupt(TrainerCallback):
    """On the first SIGINT, end after the running step, with a checkpoint; on the second, at once."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\ninterrupted: this step ends, then all is saved; Ctrl-C again stops at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
