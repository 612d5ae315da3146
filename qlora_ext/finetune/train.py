"""The training run: a schedule, what it measures, and how it is interrupted and resumed.

Ctrl-C, SIGTERM or SIGHUP lets the running step end, then saves; a second Ctrl-C or SIGTERM stops at once.
"""

import logging
import math
import shutil
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from .callbacks import Interrupt, Watch
from .data import Dataset
from .optimizer import OptimizerChoice, StatesReport, paged, where_states_are
from .output_folder import STAGING, newest_checkpoint
from .trainer import AnswerTrainer, check_states, unusable

# transformers 5.23 renamed gradient_checkpointing to activation_checkpointing and warns of the old name; Python 3.10
# gets 5.20.
CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
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
    gradient_bytes: int | None  # None, as the states': no step was left to take
    optimizer: StatesReport | None


def total_steps(examples: int, epochs: float, batch_size: int, accumulate: int) -> int:
    """Optimizer steps in `epochs` passes over `examples`; the last batch of a pass may be short."""
    passes = Fraction(str(epochs))  # as it was given: in floats 1.1 * 10 is above 11
    return math.ceil(passes * math.ceil(math.ceil(examples / batch_size) / accumulate))


def _saved_state(checkpoint: Path) -> TrainerState:
    """Read how far a checkpoint's run was; ValueError when its file is missing or damaged."""
    file = checkpoint / TRAINER_STATE_NAME
    try:
        state: TrainerState = TrainerState.load_from_json(str(file))
    except FileNotFoundError as error:
        raise unusable(file, "missing") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: expected the state of a run, got a damaged file ({error})") from error
    if checkpoint.name != f"checkpoint-{state.global_step}":
        raise ValueError(f"{file}: expected the state of {checkpoint.name}, got global_step {state.global_step!r}")
    return state


def resumable(output: Path, schedule: Schedule) -> tuple[Path, TrainerState]:
    """The checkpoint in `output` that a run goes on from, and how far it was.

    Raises: ValueError when there is none, or not all that is needed of it but its weights, or more steps are done than
    the schedule has.
    """
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        raise ValueError(f"{output}: expected a checkpoint to resume from, got none")
    state = _saved_state(checkpoint)
    done, steps = state.global_step, schedule.steps
    if done > steps:
        raise ValueError(f"--resume: --steps: expected at least the {done} that are done, got {steps}")
    if done < steps:
        check_states(checkpoint, schedule.optimizer)
    return checkpoint, state


def has_other_rates(schedule: Schedule, state: TrainerState) -> bool:
    """Whether the learning rates to come are others than those of the schedule that a run was in."""
    if schedule.steps == state.max_steps:
        return False
    before, now = _warmup_steps(replace(schedule, steps=state.max_steps)), _warmup_steps(schedule)
    return schedule.kind != "constant" or (before != now and state.global_step < max(before, now))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    schedule: Schedule,
    output: Path,
    *,
    adapter: bool,
    autocast: bool = False,
    resume: tuple[Path, TrainerState] | None = None,
) -> Outcome:
    """Train the parameters that require a gradient and save them into `output`.

    Args:
        adapter: save and load the active adapter only; False saves the whole model.
        autocast: bfloat16 computation from float32 weights.
        resume: what `resumable` gave, to go on from there; without it, no checkpoint may be in `output`.

    Raises: ValueError when the loss is not finite.
    """
    checkpoint, done = resume or (None, None)
    if (output / STAGING).exists():
        shutil.rmtree(output / STAGING)

    arguments = _arguments(schedule, output, model.device, autocast)
    how: dict[str, Any] = {"loss_chunk": schedule.loss_chunk, "adapter": adapter, "autocast": autocast}
    trainer = AnswerTrainer(model, tokenizer, data, arguments, schedule.optimizer, **how)
    trainer.remove_callback(PrinterCallback)
    watch, interrupt = Watch(), Interrupt()
    trainer.add_callback(watch)
    trainer.add_callback(interrupt)

    states = None
    with interrupt:
        if done is not None and done.global_step >= schedule.steps:
            trainer._load_from_checkpoint(str(checkpoint))  # Trainer would take one step too many
            trainer.state = done
        else:
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                states = where_states_are(trainer.optimizer)
            except UnpicklingError as error:
                expected = "training state of plain values and tensors"
                raise ValueError(f"{checkpoint}: expected {expected}, got something else, not loaded") from error
            finally:
                watch.close()
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
        gradient_bytes=watch.gradient_bytes or None,
        optimizer=states,
    )


def _arguments(schedule: Schedule, output: Path, device: torch.device, autocast: bool) -> TrainingArguments:
    checkpointing: dict[str, Any] = {
        f"{CHECKPOINTING}_checkpointing": schedule.gradient_checkpointing,
        f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": False},
    }
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
        eval_strategy="steps" if schedule.eval_steps else "no",
        eval_steps=schedule.eval_steps or None,
        save_strategy="steps",
        save_steps=schedule.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        disable_tqdm=True,  # Watch has the bar, with the loss in it
        report_to="none",
        **checkpointing,
    )
    # Else as ACCELERATE_MIXED_PRECISION says, which `accelerate launch` sets.
    arguments.mixed_precision = "bf16" if autocast else "no"
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer wraps the model in DataParallel, which its docs advise against
    return arguments


def _warmup_steps(schedule: Schedule) -> int:
    """A share leaves at least one step: the first of a warmup has a learning rate of 0."""
    if schedule.warmup >= 1:
        return int(schedule.warmup)
    return min(math.ceil(schedule.warmup * schedule.steps), schedule.steps - 1)
