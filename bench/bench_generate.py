"""Generating text: tokens/s of `model.generate` with the base in NF4 by us, by bitsandbytes, and dense.

64 tokens, greedy, after a prompt of 16, batch 1: the time of a call holds the prompt too. `--model` is a .gguf or a
model folder (default: build/demo/model.gguf of make demo, if there); without one a llama of SmolLM2-135M's shape with
random weights is measured, which takes the same time. `tokens_agreeing` of our row: how many tokens are those of our
own weights dequantized to dense layers, before the first that is not (both round, in different places).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import record
import smollm2
import torch
from options import DTYPES, NATIVE
from timing import interleaved, percentiles
from torch import nn
from transformers import GenerationConfig

import qlora_ext

PROMPT = 16


def dequantized(model: nn.Module) -> nn.Module:
    """Every Linear4bit exchanged for an nn.Linear of the decoded weight."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, qlora_ext.Linear4bit):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
            linear.bias = layer.bias
            model.set_submodule(name, linear)
    return model


def generation(model: nn.Module, prompt: torch.Tensor, tokens: int) -> Callable[[], list[int]]:
    """A function that generates exactly so many tokens, greedily, and returns them."""
    how = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    model.generation_config = GenerationConfig()  # from a folder's, generate() would take penalties, beams and ends
    generate: Any = model.eval().generate

    @torch.no_grad()
    def call() -> list[int]:
        output = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how)
        return list(output[0, prompt.shape[1] :].tolist())

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = str(smollm2.DEMO) if smollm2.DEMO.exists() else None
    parser.add_argument("--model", default=found, help="a .gguf or a model folder (default: that of make demo, if any)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default=NATIVE)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20, help="of measuring for each provider")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and no record, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.seconds = 8, 0.1

    model = smollm2.load(args.model, dtype=DTYPES[args.dtype], tiny=args.smoke).requires_grad_(False)
    torch.manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    call = partial(generation, prompt=prompt, tokens=args.tokens)
    ours = qlora_ext.quantize_model(copy.deepcopy(model))
    calls = {
        "qlora_ext": call(ours),
        "bitsandbytes": call(peers.bitsandbytes_4bit(copy.deepcopy(model))),
        "dense": call(model),
    }
    generated = {provider: generate() for provider, generate in calls.items()}
    assert all(len(tokens) == args.tokens for tokens in generated.values()), generated
    pairs = zip(generated["qlora_ext"], call(dequantized(copy.deepcopy(ours)))(), strict=True)
    agreeing = next((index for index, (mine, same) in enumerate(pairs) if mine != same), args.tokens)

    same = {"bench": "generate", "model": smollm2.name(args.model, tiny=args.smoke), "dtype": str(model.dtype)[6:]}
    same |= {"prompt": PROMPT, "tokens": args.tokens}
    rows: list[dict[str, Any]] = []
    for provider, times in interleaved(calls, seconds=args.seconds).items():
        timed = percentiles(times)
        row: dict[str, Any] = {"provider": provider, "tokens_per_s": args.tokens / timed["p50"]}
        if provider == "qlora_ext":
            row["tokens_agreeing"] = agreeing
        rows.append(same | row | timed)
    record.write("generate", rows, smoke=args.smoke)


if __name__ == "__main__":
    main()
