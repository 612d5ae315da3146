"""The script that people write, with NF4Config, with BitsAndBytesConfig and in plain bf16: load, SFTTrainer, generate.

Each model is an ordinary folder of random weights (the time does not depend on them), made once in build/bench. All
three ways run in one process: loads in turn, a few steps of each trainer in turn, generations in turn. A step is what
lies between SFTTrainer's on_step_begin and on_step_end. Generation is greedy, with the adapter on, and follows the
training, as bitsandbytes' layers give no gradient on a CPU once they have evaluated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from options import DTYPES, NATIVE
from timing import interleaved, percentiles

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from datasets import Dataset
from peft import LoraConfig
from smollm2 import SMOLLM2, TINY
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from qlora_ext import NF4Config

FOLDER = Path(__file__).parent.parent / "build" / "bench"
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
PROMPT, NEW_TOKENS, ROUND = 16, 32, 4  # ROUND: steps of a trainer before the next has its turn


@dataclass(frozen=True)
class Training:
    """A model and the shape of its batches."""

    config: LlamaConfig
    batch: int
    length: int


TRAININGS = {
    "SmolLM2-135M": Training(SMOLLM2, 8, 128),
    "4 layers of Llama-3-8B": Training(LlamaConfig(**LLAMA_3_8B, num_hidden_layers=4, vocab_size=32000), 1, 512),
}
SMOKE = {"tiny": Training(TINY, 2, 16)}


class StepTimes(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def ways(dtype: torch.dtype) -> dict[str, Any]:
    """The one argument in which the scripts differ."""
    bitsandbytes = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"qlora_ext": NF4Config(), "bitsandbytes": bitsandbytes, "LoRA, not quantized": None}


def model_folder(name: str, training: Training, dtype: torch.dtype) -> Path:
    """The model's folder, made at the first call."""
    folder = FOLDER / f"{name.replace(' ', '-')}-{str(dtype)[6:]}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(training.config).to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype, quantization: Any) -> Any:
    options = {} if quantization is None else {"quantization_config": quantization}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def trainer_of(model: Any, training: Training, times: StepTimes, output: str) -> SFTTrainer:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    draw = torch.Generator().manual_seed(0)
    shape = (training.batch * ROUND, training.length)
    ids = torch.randint(2, training.config.vocab_size, shape, generator=draw).tolist()
    arguments = SFTConfig(
        output_dir=output,
        max_steps=ROUND,
        per_device_train_batch_size=training.batch,
        gradient_checkpointing=False,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        max_length=training.length,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[times],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the rows
    return trainer


def loads(folder: Path, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for provider, quantization in ways(dtype).items():
            start = time.perf_counter()
            load(folder, dtype, quantization)
            seconds.setdefault(provider, []).append(time.perf_counter() - start)
    return seconds


def generation(model: Any, vocabulary: int) -> Callable[[], object]:
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, vocabulary, (1, PROMPT), generator=draw)
    model.eval()
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 1}
    return lambda: model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **how)


def measure(name: str, training: Training, dtype: torch.dtype, rounds: int, seconds: float) -> list[dict[str, Any]]:
    folder = model_folder(name, training, dtype)
    same = {"bench": "script", "model": name, "dtype": str(dtype)[6:]}
    same |= {"batch": training.batch, "length": training.length, "prompt": PROMPT, "new_tokens": NEW_TOKENS}
    loaded = loads(folder, dtype, min(rounds, 3))
    times = {provider: StepTimes() for provider in loaded}
    with tempfile.TemporaryDirectory() as output:
        trainers = {
            provider: trainer_of(load(folder, dtype, quantization), training, times[provider], output)
            for provider, quantization in ways(dtype).items()
        }
        losses = {provider: trainer.train().training_loss for provider, trainer in trainers.items()}
        for each in times.values():
            each.seconds.clear()  # the first steps of a process are slower
        for _ in range(rounds):
            for trainer in trainers.values():
                trainer.train()
    calls = {provider: generation(trainer.model, training.config.vocab_size) for provider, trainer in trainers.items()}
    generated = interleaved(calls, seconds=seconds)
    rows: list[dict[str, Any]] = []
    for provider, trainer in trainers.items():
        held = {"provider": provider, "model_bytes": trainer.model.get_base_model().get_memory_footprint()}
        held["loss"] = losses[provider]
        rows.append(same | held | {"measure": "load"} | percentiles(loaded[provider]))
        for measured, seconds_of, tokens in (
            ("train", times[provider].seconds, training.batch * training.length),
            ("generate", generated[provider], NEW_TOKENS),
        ):
            timed = percentiles(seconds_of)
            rows.append(same | held | {"measure": measured, "tokens_per_s": tokens / timed["p50"]} | timed)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default=NATIVE)
    parser.add_argument("--models", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--rounds", type=int, default=8, help=f"of {ROUND} steps for each trainer")
    parser.add_argument("--seconds", type=float, default=20, help="of generating for each")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and no record, to see that it runs")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    trainings = SMOKE if args.smoke else {name: TRAININGS[name] for name in args.models}
    if args.smoke:
        args.rounds, args.seconds = 1, 0.1
    rows = []
    for name, training in trainings.items():
        rows += measure(name, training, DTYPES[args.dtype], args.rounds, args.seconds)
    record.write("script", rows, smoke=args.smoke)


if __name__ == "__main__":
    main()
