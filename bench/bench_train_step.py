"""One training step of a language model: tokens/s of our QLoRA, PEFT + bitsandbytes, and PEFT LoRA on the bf16 base.

A step is forward, loss, backward and AdamW on the adapters (r=8, all linear layers), batch 4 x 128 tokens, bf16.
`--model` is a .gguf or a model folder (make demo leaves one in build/demo/model.gguf); without it a llama of the same
shape with random weights is measured, which takes the same time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import record
import torch
from timing import interleaved, percentiles
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def training_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], float]:
    """A function that makes one step and returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a .gguf or a model folder; none: random weights in SmolLM2-135M's shape")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=40, help="of measuring for each method")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and no record, to see that it runs")
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.smoke:
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        model, args.seconds = LlamaForCausalLM(LlamaConfig(vocab_size=99, **tiny)).bfloat16(), 0.1
    elif args.model:
        from qlora_ext.finetune.load import load_model, open_checkpoint

        model = load_model(open_checkpoint(args.model), dtype=torch.bfloat16, device=torch.device("cpu"))
    else:
        model = LlamaForCausalLM(SMOLLM2).bfloat16()
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length))

    steps = {name: training_step(peers.build(name, model), ids) for name in peers.METHODS}
    losses = {name: step() for name, step in steps.items()}
    reference = losses["PEFT LoRA on bf16"]
    # The adapters start at zero: all methods see about the same model.
    assert all(abs(loss - reference) < 0.1 * reference for loss in losses.values()), losses

    tokens = args.batch * args.length
    same = {
        "bench": "train_step",
        "model": Path(args.model).resolve().name if args.model else "random, SmolLM2-135M",
        "dtype": "bfloat16",
    }
    same |= {"batch": args.batch, "length": args.length}
    rows: list[dict[str, Any]] = []
    for name, times in interleaved(steps, seconds=args.seconds).items():
        timed = percentiles(times)
        rows.append(same | {"provider": name, "tokens_per_s": tokens / timed["p50"]} | timed)
    record.write("train_step", rows, smoke=args.smoke)


if __name__ == "__main__":
    main()
