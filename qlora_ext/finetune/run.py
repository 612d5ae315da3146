"""One fine-tuning run, from the command line's options to the report."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import TrainerState

import qlora_ext
from qlora_ext.info import built_for_cuda, describe, gpu, runs_on

from .callbacks import check_finite
from .compile import compile_layers
from .data import Dataset, PadToLongest, load_data
from .evaluate import compared, held_out_loss, sample_answers
from .load import compute_dtype, load_model, open_checkpoint, suitable_attention
from .loss import check_head, suitable_chunk
from .model_checks import check_fits, check_runs
from .optimizer import OptimizerChoice, StatesReport, check_page_file
from .output_folder import OutputFolder
from .report import composition, peak_rss, table, write
from .same_run import check_same_run, is_reported, note, what_stays
from .targets import target_modules
from .train import Outcome, Schedule, has_other_rates, resumable, total_steps, train
from .trainer import check_weights

# Where the states were, when all steps were made by a process that ended before it could say.
NOT_SEEN: dict[str, Any] = {field.name: None for field in dataclasses.fields(StatesReport)}


def run(options: argparse.Namespace) -> int:
    """Load, train, evaluate before and after, save and report; return 0, or 130 when a signal ended the training."""
    device = _device(options)
    with OutputFolder(options.output) as folder, _repeatable(device):
        return _run(options, folder, device)


def _run(options: argparse.Namespace, folder: OutputFolder, device: torch.device) -> int:
    adapter = options.method != "full"
    if options.device_budget is not None and device.type == "cpu":
        raise ValueError("--device-budget: expected training on a GPU, got the CPU: --host-budget is for its states")
    dtype = compute_dtype(options.dtype, device)
    if options.page_file is not None and options.host_budget is None:
        _say("--page-file: stays empty, as host memory holds all states: --host-budget limits it")

    same = {**what_stays(options), "dtype": "bf16" if dtype == torch.bfloat16 else "fp32"}  # whatever auto is here
    if options.resume:
        check_same_run(options.output, same)
    checkpoint = open_checkpoint(options.model)
    tokenizer = checkpoint.tokenizer()
    data = _examples(options, tokenizer)
    same["examples"] = f"{len(data.train)} + {len(data.held_out)}"  # of the same file other versions made others
    if options.resume:
        check_same_run(options.output, same)
    steps = options.steps or total_steps(len(data.train), options.epochs, options.batch_size, options.accumulate)
    schedule = _schedule(options, steps, None)
    resume = resumable(options.output, schedule) if options.resume else None
    if resume is not None:
        newest, state = resume
        if state.global_step == steps and is_reported(options.output):
            _say(f"step {steps} of {steps} was done before: report.json and report.png are in {options.output}")
            return 0
        check_weights(newest, adapter=adapter)
        if has_other_rates(schedule, state):
            meant = state.max_steps
            _say(f"{meant} steps were meant before, now {steps}: the learning rate goes on as if they had been")
    longest = max(len(example.input_ids) for example in (*data.train, *data.held_out))
    data = dataclasses.replace(data, held_out=data.held_out[: options.eval_examples])
    if options.eval_steps and not data.held_out:
        raise ValueError(f"--eval-steps: expected examples held out, got --eval-fraction {options.eval_fraction}")

    model = load_model(
        checkpoint,
        dtype=dtype if adapter else torch.float32,
        device=device,
        quantize=_quantization(options),
        attention=options.attention or suitable_attention(dtype, device, longest),
    )
    model.config._name_or_path = options.model
    transformers.set_seed(options.seed)  # the adapter starts the same on every base
    if adapter:
        qlora_ext.add_adapter(model, _lora_config(options, model))
    check_fits(model, data, tokenizer.pad_token_id or 0)
    if options.method == "qlora":
        check_runs(model)
    if options.loss_chunk:
        check_head(model)
    chunk = suitable_chunk(model) if options.loss_chunk is None else options.loss_chunk or None
    if options.compile:
        _say(f"{compile_layers(model)} layers to compile: the first step takes a minute")

    if options.page_file is not None and options.page_file.parent.is_dir():
        check_page_file(options.page_file)
    schedule = dataclasses.replace(schedule, loss_chunk=chunk)
    folder.begin(resume=options.resume, overwrite=options.overwrite)
    note(options.output, same)
    report = _train(options, model, tokenizer, data, schedule, dtype, resume)
    if report is None:
        _say("stopped: the same command with --resume goes on from here")
        return 130
    write(report, options.output)
    _print(table(report))
    _say(f"report.json and report.png are in {options.output}")
    return 0


def _examples(options: argparse.Namespace, tokenizer: transformers.PreTrainedTokenizerBase) -> Dataset:
    data = load_data(
        options.data,
        tokenizer,
        max_length=options.max_length,
        held_out_fraction=options.eval_fraction,
        seed=options.seed,
        use_chat_template=options.chat == "auto",
    )
    _say(
        f"{len(data.train)} examples to train on, {len(data.held_out)} held out ({data.duplicates} duplicates removed, "
        f"{data.truncated} truncated to {options.max_length} tokens, {data.dropped} dropped with no answer left)"
    )
    if data.unread:
        _say(f"{options.data}: fields that are not read: {', '.join(data.unread)}")
    return data


def _train(
    options: argparse.Namespace,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    data: Dataset,
    schedule: Schedule,
    dtype: torch.dtype,
    resume: tuple[Path, TrainerState] | None,
) -> dict[str, Any] | None:
    """Train in this dtype and save, and evaluate before and after; the report, or None if a signal ended it."""
    adapter, chunk = options.method != "full", schedule.loss_chunk
    autocast = not adapter and dtype == torch.bfloat16  # full fine-tuning keeps fp32 weights and computes in bf16
    collate = PadToLongest(tokenizer.pad_token_id or 0)
    shown = (data.held_out or data.train)[: options.samples]

    def evaluate() -> tuple[float | None, list[str]]:
        loss = None
        if data.held_out:
            loss = held_out_loss(model, data.held_out, collate, options.batch_size, autocast=autocast, chunk=chunk)
        return loss, sample_answers(model, tokenizer, shown, autocast=autocast)

    figures = composition(model, adapter=adapter)
    loss_before, answers_before = evaluate()
    if loss_before is not None:
        _say(f"held-out loss before: {loss_before:.4f}")
    outcome = train(model, tokenizer, data, schedule, options.output, adapter=adapter, autocast=autocast, resume=resume)
    _say(f"step {outcome.step} of {schedule.steps}: {'adapter' if adapter else 'model'} saved in {options.output}")
    if outcome.interrupted:
        return None

    loss_after, answers_after = evaluate()
    if loss_after is not None:
        check_finite(loss_after, "held-out loss", outcome.step)
    return _report(
        options,
        data,
        outcome,
        base={
            **figures,
            "dtype": str(dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "loss_chunk": chunk,
        },
        loss_before=loss_before,
        loss_after=loss_after,
        samples=compared(tokenizer, shown, answers_before, answers_after),
    )


def _report(
    options: argparse.Namespace,
    data: Dataset,
    outcome: Outcome,
    *,
    base: dict[str, Any],
    loss_before: float | None,
    loss_after: float | None,
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    """What report.json says: of the model in `base`, of its training, and held-out losses and answers around that."""
    states = outcome.optimizer
    return {
        "method": options.method,
        **base,
        "gradient_bytes": outcome.gradient_bytes,
        "optimizer_bytes": states.state_bytes if states else None,
        "optimizer": {"kind": options.optimizer, **(dataclasses.asdict(states) if states else NOT_SEEN)},
        "peak_rss_bytes": peak_rss(),
        # Of the steps of this process: with --resume, of those after it.
        "tokens_per_second": outcome.tokens / outcome.seconds if outcome.seconds else None,
        "tokens": outcome.tokens,
        "step_seconds": outcome.seconds,
        "step": outcome.step,
        "held_out_loss_before": loss_before,
        "held_out_loss_after": loss_after,
        "held_out_losses": outcome.held_out,
        "losses": outcome.losses,
        "samples": samples,
        "examples": {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "duplicates": data.duplicates,
            "truncated": data.truncated,
            "dropped": data.dropped,
        },
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "environment": {**describe(), "transformers": transformers.__version__},
    }


def _device(options: argparse.Namespace) -> torch.device:
    if not (world := os.environ.get("WORLD_SIZE", "1")).isdecimal() or int(world) > 1:
        raise ValueError(f"WORLD_SIZE: expected one process, got {world or repr(world)}: gradients are not shared")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if options.method == "qlora" or options.optimizer != "adamw":
        if not built_for_cuda():
            _say("this build of qlora_ext has no CUDA kernels: training on the CPU")
            return torch.device("cpu")
        if not runs_on("cuda"):
            _say(f"training on the CPU, not on {gpu()}")
            return torch.device("cpu")
    return torch.device("cuda")


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """The same bytes in each run on a CPU: else torch adds up the gradients of an index (a mixture's) in any order."""
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # all that is read is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def _quantization(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.method != "qlora":
        return None
    return {
        "quant_type": options.quant_type,
        "blocksize": options.blocksize,
        "double_quant": not options.no_double_quant,
        "skip": options.skip or (),
    }


def _lora_config(options: argparse.Namespace, model: transformers.PreTrainedModel) -> qlora_ext.LoraConfig:
    return qlora_ext.LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=target_modules(options.target_modules, model),
        target_parameters=options.target_parameters or [],
        use_rslora=options.use_rslora,
    )


def _schedule(options: argparse.Namespace, steps: int, loss_chunk: int | None) -> Schedule:
    return Schedule(
        steps=steps,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        lr=options.lr,
        kind=options.schedule,
        warmup=options.warmup,
        eval_steps=options.eval_steps or 0,
        save_steps=options.save_steps,
        seed=options.seed,
        gradient_checkpointing=options.gradient_checkpointing,
        loss_chunk=loss_chunk,
        optimizer=OptimizerChoice(options.optimizer, options.device_budget, options.host_budget, options.page_file),
    )


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))  # answers may have letters that it has not


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
