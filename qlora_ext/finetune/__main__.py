"""Fine-tune a causal language model: `python -m qlora_ext.finetune --help`."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_ext import LoraConfig

from .methods import METHODS, unread_by
from .optimizer import KINDS
from .output_folder import checkpoints, earlier_run

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    top = argparse.ArgumentParser(
        prog="python -m qlora_ext.finetune",
        description="Fine-tune a causal language model on questions with answers, conversations or plain text.",
        epilog="Ctrl-C, SIGTERM or SIGHUP ends the running step and saves; the same command with --resume goes on "
        "from there.",
        formatter_class=_Formatter,
    )
    required: dict[str, Any] = {"required": True, "default": argparse.SUPPRESS}
    top.add_argument("--model", help="Hugging Face folder or hub name, or a llama-architecture .gguf file", **required)
    top.add_argument(
        "--data",
        type=Path,
        help='JSONL, a line {"prompt", "response"} or {"messages": [{"role", "content"}, ...]}, loss on the answers '
        "only; or a .txt file, cut into windows of --max-length tokens, loss on every token (equal windows "
        "count once)",
        **required,
    )
    top.add_argument(
        "--method",
        choices=METHODS,
        help="qlora: adapter on a 4-bit base; lora: adapter on a 16/32-bit base; full: every weight",
        **required,
    )
    top.add_argument(
        "--output",
        type=Path,
        help="folder for the adapter (or model), checkpoints, report.json, report.png",
        **required,
    )
    top.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    top.add_argument("--overwrite", action="store_true", help="delete an earlier run, or a model, in --output first")

    run = top.add_argument_group("training")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive, help="optimizer steps (instead of --epochs)")
    length.add_argument("--epochs", type=_positive_float, default=1.0, help="passes over the training examples")
    run.add_argument("--batch-size", type=_positive, default=8, help="examples of a forward pass")
    run.add_argument("--accumulate", type=_positive, default=1, help="forward passes of an optimizer step")
    run.add_argument("--lr", type=_rate, default=2e-4, help="peak learning rate; full usually wants 2e-5")
    run.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear", help="after the warmup")
    run.add_argument("--warmup", type=_not_negative, default=0.03, help="steps, or a share of all steps if below 1")
    run.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help=_DTYPE_HELP)
    run.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    run.add_argument("--loss-chunk", type=_count, metavar="TOKENS", help=_CHUNK_HELP)
    run.add_argument("--attention", choices=ATTENTIONS, help=_ATTENTION_HELP)
    run.add_argument("--compile", action="store_true", help=_COMPILE_HELP)
    run.add_argument("--seed", type=_seed, default=0, help="of the split, the adapter, the order and the dropout")
    run.add_argument("--save-steps", type=_positive, default=100, help="steps between checkpoints; the last 2 are kept")

    optimizer = top.add_argument_group("optimizer")
    optimizer.add_argument("--optimizer", choices=KINDS, default="adamw", help=_OPTIMIZER_HELP)
    optimizer.add_argument("--device-budget", type=_size, metavar="BYTES", help=_DEVICE_BUDGET_HELP)
    optimizer.add_argument("--host-budget", type=_size, metavar="BYTES", help=_HOST_BUDGET_HELP)
    optimizer.add_argument("--page-file", type=Path, metavar="PATH", help=_PAGE_FILE_HELP)

    text = top.add_argument_group("data")
    text.add_argument("--max-length", type=_positive, default=512, help="tokens; longer examples lose their right end")
    text.add_argument("--chat", choices=("auto", "plain"), default="auto", help=_CHAT_HELP)
    text.add_argument("--eval-fraction", type=_fraction, default=0.1, help="share of the examples that is held out")
    text.add_argument("--eval-examples", type=_positive, help="use at most so many held-out examples (default: all)")
    text.add_argument("--eval-steps", type=_positive, help="steps between held-out losses (default: before and after)")
    text.add_argument("--samples", type=_count, default=3, help="sample answers, before and after")

    adapter = top.add_argument_group("adapter (qlora, lora)")
    adapter.add_argument("--r", type=_positive, default=LoraConfig.r, help="rank")
    adapter.add_argument("--lora-alpha", type=_positive_float, default=LoraConfig.lora_alpha, help="scale: alpha / r")
    adapter.add_argument(
        "--lora-dropout", type=_fraction, default=LoraConfig.lora_dropout, help="of the adapter's input"
    )
    adapter.add_argument(
        "--target-modules", default=LoraConfig.target_modules, help="all-linear, names with commas, a regex, or none"
    )
    adapter.add_argument("--target-parameters", type=_names, metavar="NAMES", help=_PARAMETERS_HELP)
    adapter.add_argument("--use-rslora", action="store_true", help="scale by alpha / sqrt(r)")

    base = top.add_argument_group("4-bit base (qlora)")
    base.add_argument("--quant-type", choices=("nf4", "fp4"), default="nf4", help="code of the weights")
    base.add_argument("--blocksize", type=int, default=64, help="weights sharing a scale: a power of two, 32 to 4096")
    base.add_argument("--no-double-quant", action="store_true", help="keep the scales in fp32: 4.5 bits, not 4.13")
    base.add_argument("--skip", type=_names, metavar="NAMES", help=_SKIP_HELP)
    return top


_DTYPE_HELP = "of the computation; auto: bf16 where the machine multiplies it natively (adapters are always fp32)"
_CHUNK_HELP = (
    "make the output head's logits, and their gradients, for so many answer tokens at a time: less memory, the same "
    "loss; 0: all of a batch at once; for models whose logits are the result of lm_head (default: 256 on a CPU, 1024 "
    "on a GPU, and 0 for other models and for a head that trains)"
)
_ATTENTION_HELP = (
    "transformers' implementation; in bf16 on a CPU eager is faster for examples of up to 512 tokens, and keeps length "
    "x length weights of each head in memory (default: eager in bf16 on a CPU if no example is longer than 128 "
    "tokens, and otherwise transformers' own choice for the model, mostly sdpa)"
)
_COMPILE_HELP = (
    "torch.compile of the layers: fewer passes over memory, after a minute in the first step; needs g++ on CPU"
)
_OPTIMIZER_HELP = (
    "adamw: torch's; paged_adamw32: the same with its states in pages, which need not fit into memory; paged_adamw8: "
    "with states of 8 bits, a quarter of the memory"
)
_DEVICE_BUDGET_HELP = "of GPU memory for states (512M, 2G); the others are in host memory (default: no limit)"
_HOST_BUDGET_HELP = "of host memory for states; the others are in the page file (default: no limit)"
_PAGE_FILE_HELP = "scratch file for the states that the budgets do not hold; deleted at the end"
_SKIP_HELP = (
    "linear layers, names with commas, that stay in 16/32 bits: for a model that reads the weight of a layer instead "
    "of calling it, as Mamba does with x_proj,dt_proj,out_proj (default: none but the heads)"
)
_PARAMETERS_HELP = (
    "weights of a mixture's fused experts that get adapters beside --target-modules, names with commas, as "
    "experts.gate_up_proj,experts.down_proj; with --method qlora, without dropout (default: none)"
)
_CHAT_HELP = 'auto: the tokenizer\'s chat template if it has one; plain: lines of "role: content"'


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    That is 0, 2 for what one line can tell (a mistake, a loss that has diverged, a full disk), or 130 for a signal.
    """
    command = parser()
    options = command.parse_args(arguments)
    with _naming(command, "data", options.data):
        if not options.data.is_file():
            command.error(f"--data {options.data}: no such file")
    with _naming(command, "model", options.model):
        model = Path(options.model).resolve() if Path(options.model).is_dir() else None
    with _naming(command, "output", options.output):
        _check_output(command, options, model)
    with _naming(command, "page-file", options.page_file):
        _check_paging(command, options)
    if unread := _unread(command, options):
        print(f"--method {options.method} does not read {', '.join(unread)}", file=sys.stderr)
    _check_targets(command, options)

    try:
        from .run import run  # here, because transformers takes seconds and --help should not
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("qlora_ext"):
            raise
        command.error(f"needs the package {error.name}: install qlora_ext as `.[finetune]`, see README.md")

    try:
        return run(options)
    except (ValueError, TypeError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; --resume goes on from the last checkpoint in {options.output}, if any", file=sys.stderr)
        return 130


def _unread(command: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Options that were given, and that the method does without."""
    given = [name for name in unread_by(options.method) if getattr(options, name) != command.get_default(name)]
    return [f"--{name.replace('_', '-')}" for name in given]


@contextmanager
def _naming(command: argparse.ArgumentParser, option: str, value: object) -> Iterator[None]:
    """Name the option whose value is a link in a circle, or a name that cannot be."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        command.error(f"--{option} {value}: {error}")


def _check_output(command: argparse.ArgumentParser, options: argparse.Namespace, model: Path | None) -> None:
    if options.output.exists() and not options.output.is_dir():
        command.error(f"--output {options.output}: not a folder")
    if options.resume and options.overwrite:
        command.error("--resume and --overwrite exclude each other")
    if options.resume and not checkpoints(options.output):
        command.error(f"--resume: no checkpoint in {options.output}")
    if model is not None and options.output.resolve() in (model, *model.parents):
        command.error(f"--output {options.output}: expected a folder that does not hold --model")
    if not (options.resume or options.overwrite) and (reason := earlier_run(options.output)):
        command.error(reason)


def _check_paging(command: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("device_budget", "host_budget", "page_file"):
        if options.optimizer == "adamw" and getattr(options, name) is not None:
            command.error(f"--{name.replace('_', '-')}: expected a paged --optimizer with it, got adamw")
    if options.host_budget is not None and options.page_file is None:
        command.error("--host-budget: expected --page-file with it, for the states that it does not hold")
    if options.page_file is not None:
        folder = options.page_file.parent
        if not folder.is_dir() and folder != options.output:  # which will be made
            command.error(f"--page-file {options.page_file}: no such folder")


def _check_targets(command: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.target_modules == "none" and not options.target_parameters:
        command.error("--target-modules: expected --target-parameters with none")
    if options.target_parameters and options.method != "qlora":
        command.error(f"--target-parameters: expected --method qlora with it, got {options.method}")
    if options.target_parameters and options.lora_dropout:
        command.error(f"--target-parameters: expected --lora-dropout 0 with it, got {options.lora_dropout}")


def _number(kind: Callable[[str], Any], accept: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return convert


def _names(text: str) -> list[str]:
    return text.split(",")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if match is None:
        raise ValueError
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


_size = _number(_bytes, lambda value: value < 1 << 63, "bytes, as 512M, 2G or 536870912")
_positive = _number(int, lambda value: value > 0, "a whole number above 0")
_count = _number(int, lambda value: value >= 0, "a whole number, 0 or more")
_positive_float = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
_not_negative = _number(float, lambda value: 0 <= value < math.inf, "a number, 0 or more")
_fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
_rate = _number(_positive_float, lambda value: value <= 1e37, "1e37 at most")  # AdamW's first step is 10 times as large
_seed = _number(int, lambda value: 0 <= value < 1 << 32, "a whole number from 0 to 4294967295")  # as numpy wants it

if __name__ == "__main__":
    sys.exit(main())
