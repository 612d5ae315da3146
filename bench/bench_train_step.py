"""One training step of a language model: speed, peak memory and a profile of our QLoRA, PEFT + bitsandbytes, PEFT LoRA.

A step is forward, loss, backward and AdamW on the adapters (r=8, all linear layers), batch 4 x 128 tokens. Ours
is measured as transformers makes the model, then, one after the other, as `finetune` does for such examples: the loss
by chunks, eager attention; and on request with compiled layers (its `--compile`). The peers with eager attention, too,
as it needs nothing of ours. Memory is the peak RSS of one child process for each, from the import
of torch on. Then torch.profiler says where the time of a step goes (train_step_profile.jsonl; compiled layers have no
parts to see).

With `--lora-dropout` the same steps, but for the profile, go to train_step_dropout.jsonl.

`--model` is a .gguf or a model folder (make demo leaves one in build/demo/model.gguf); without it a llama of the same
shape with random weights is measured, which takes the same time.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import record
import smollm2
import torch
from options import DTYPES, NATIVE
from step_profile import LOSS, OPTIMIZER, PARTS, mark_parts, profiled, scope
from timing import interleaved, percentiles
from torch import nn

from qlora_ext.finetune.compile import compile_layers
from qlora_ext.finetune.loss import CHUNK_ON_CPU, answer_loss
from qlora_ext.finetune.report import peak_rss

STEPS_OF_MEMORY, STEPS_OF_PROFILE = 3, 5


@dataclass(frozen=True)
class Way:
    """How a step is made: one of peers.METHODS, with options of `finetune`."""

    method: str
    chunked: bool = False
    eager: bool = False  # attention
    compiled: bool = False

    def __str__(self) -> str:
        options = {"chunked loss": self.chunked, "eager attention": self.eager, "compiled": self.compiled}
        return ", ".join([self.method, *(name for name, chosen in options.items() if chosen)])

    def build(self, model: nn.Module, lora_dropout: float) -> nn.Module:
        """The model under this method, in training mode; the model itself is used up."""
        if self.eager:
            model.set_attn_implementation("eager")
        built = peers.METHODS[self.method](model, lora_dropout).train()
        if self.compiled:
            compile_layers(built)
        return built


OURS, *PEERS = peers.METHODS
WAYS = [Way(OURS), Way(OURS, True), Way(OURS, True, True), Way(OURS, True, True, True)]
WAYS += [Way(peer, eager=eager) for peer in PEERS for eager in (False, True)]


def training_step(model: nn.Module, ids: torch.Tensor, chunk: int | None) -> Callable[[], float]:
    """A function that makes one step and returns the loss; chunk: of the loss, None for transformers' own loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        with scope(LOSS):  # but for the layers inside, which have scopes of their own
            if chunk is None:
                loss = model(input_ids=ids, labels=ids).loss
            else:
                total, tokens = answer_loss(model, {"input_ids": ids, "labels": ids}, chunk)
                loss = total / tokens
        loss.backward()
        with scope(OPTIMIZER):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peak_memory(provider: str) -> int:
    """Peak RSS, bytes, of a child process that runs this script with the same options for one provider alone."""
    command = [sys.executable, *sys.argv, "--only", provider]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a .gguf or a model folder; none: random weights in SmolLM2-135M's shape")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default=NATIVE)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lora-dropout", type=float, default=0.0, help="of the adapters' input")
    parser.add_argument("--loss-chunk", type=int, default=CHUNK_ON_CPU, help="tokens (default: finetune's)")
    parser.add_argument("--compile", action="store_true", help="ours with compiled layers, too: a minute more")
    parser.add_argument("--seconds", type=float, default=40, help="of measuring for each method")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and no record, to see that it runs")
    parser.add_argument("--only", help="print the peak memory of this provider after a few steps, and nothing else")
    args = parser.parse_args()
    if args.loss_chunk < 1:
        parser.error(f"--loss-chunk: expected at least 1, got {args.loss_chunk}")
    if not 0 <= args.lora_dropout < 1:
        parser.error(f"--lora-dropout: expected a probability in [0, 1), got {args.lora_dropout}")
    if args.smoke:
        args.batch, args.length, args.loss_chunk, args.seconds = 2, 16, 8, 0.1
    return args


def main() -> None:
    args = options()
    model = smollm2.load(args.model, dtype=DTYPES[args.dtype], tiny=args.smoke)
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length))
    ways = {str(way): way for way in WAYS if args.compile or args.only or not way.compiled}

    if args.smoke and args.lora_dropout and not args.only:  # a second look at the same: two are enough
        ways = {name: ways[name] for name in (OURS, PEERS[-1])}

    def step_of(way: Way, built: nn.Module) -> Callable[[], float]:
        return training_step(built, ids, args.loss_chunk if way.chunked else None)

    if args.only:
        way = ways[args.only]
        step = step_of(way, way.build(model, args.lora_dropout))
        for _ in range(STEPS_OF_MEMORY):
            step()
        print(json.dumps({"peak_rss_bytes": peak_rss()}))
        return

    models = {name: way.build(copy.deepcopy(model), args.lora_dropout) for name, way in ways.items()}
    steps = {name: step_of(way, models[name]) for name, way in ways.items()}
    losses = {name: step() for name, step in steps.items()}
    reference = losses[PEERS[-1]]
    # The adapters start at zero: all methods see about the same model.
    assert all(abs(loss - reference) < 0.1 * reference for loss in losses.values()), losses
    assert all(abs(losses[name] - losses[OURS]) < 1e-3 * reference for name in ways if ways[name].method == OURS), (
        losses
    )

    name = "train_step_dropout" if args.lora_dropout else "train_step"
    same = {"bench": name, "model": smollm2.name(args.model, tiny=args.smoke), "dtype": str(model.dtype)[6:]}
    same |= {"batch": args.batch, "length": args.length, "lora_dropout": args.lora_dropout}
    rows: list[dict[str, Any]] = []
    for provider, times in interleaved(steps, seconds=args.seconds).items():
        timed = percentiles(times)
        row = {"provider": provider, "tokens_per_s": args.batch * args.length / timed["p50"]}
        row["loss_chunk"] = args.loss_chunk if ways[provider].chunked else None
        if provider == OURS or not args.smoke:  # a child takes seconds to import all that it needs
            row["peak_rss_bytes"] = peak_memory(provider)
        rows.append(same | row | timed)
    record.write(name, rows, smoke=args.smoke)
    if args.lora_dropout:
        return

    same["bench"], rows = "train_step_profile", []
    for provider, way in ways.items():
        if way.compiled or (way.eager and way.method != OURS):
            continue
        mark_parts(models[provider])
        measured = [profiled(steps[provider]) for _ in range(STEPS_OF_PROFILE)]
        for part in PARTS:
            share = sum(one[part] for one in measured) / sum(sum(one.values()) for one in measured)
            timed = percentiles([one[part] for one in measured])
            rows.append(same | {"provider": provider, "part": part, "share": share} | timed)
    record.write("train_step_profile", rows, smoke=args.smoke)


if __name__ == "__main__":
    main()
