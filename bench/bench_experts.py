"""A mixture's fused experts: ours in NF4 against bitsandbytes' parametrization of them, and against dense ones.

The experts of one layer of Qwen3-30B-A3B (128 of 2048 x 768, of which a token takes 8), with random weights, under
transformers' own forward: forward, forward with the gradient of the input, and both with adapters on the experts, by
add_adapter and by PEFT, and their gradients. Each call routes other tokens, so that a call finds in the cache only what
it uses twice. `weight_bytes` is what the experts take; `refused` is what a provider raises (PEFT with bitsandbytes at
the second call).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import record
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from options import DTYPES, NATIVE
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from timing import interleaved, percentiles, rotated
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qlora_ext import LoraConfig, add_adapter
from qlora_ext.adapters.peft_layout import to_file
from qlora_ext.experts import fused_experts, quantize_experts
from qlora_ext.lora.experts import LoraExperts

SIZES = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
TINY = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4}
TAKEN = 8  # experts a token
ROUTINGS = 8  # that a provider takes in turn
DIRECTIONS = ("forward", "forward and backward", "both with adapters")
ADAPTER = {"r": 16, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def dense_experts(sizes: dict[str, int], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes)).to(dtype).requires_grad_(False)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.02)
    return experts


def under(implementation: str, experts: nn.Module) -> nn.Module:
    """The same weights under one of transformers' implementations of experts."""
    twin = copy.copy(experts)
    twin._parameters = experts._parameters.copy()
    twin.config = copy.copy(experts.config)
    twin.config._experts_implementation = implementation
    return twin


def in_4_bits(experts: nn.Module) -> nn.Module:
    ours = copy.deepcopy(experts)
    for name in fused_experts(ours):
        quantize_experts(ours, name)
    return ours


def parametrized(experts: nn.Module) -> nn.Module:
    theirs = under("eager", copy.deepcopy(experts))
    for name in fused_experts(theirs):
        replace_parameter_4bit(theirs, name, quant_type="nf4", compress_statistics=True)
    return theirs


class Layer(nn.Module):
    """What adapters are put into, as if it were a model."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts, self.config = experts, experts.config

    def forward(self, *args: Tensor) -> Tensor:
        y: Tensor = self.experts(*args)
        return y


def adapted(dense: nn.Module) -> dict[str, nn.Module]:
    """All with the same adapter. Under "eager" PEFT takes a minute a call, and is left out."""
    ours = Layer(in_4_bits(dense))
    add_adapter(ours, LoraConfig(**ADAPTER))
    models: dict[str, nn.Module] = {"qlora_ext": ours}
    for provider, experts in (
        ("bitsandbytes parametrize", parametrized(dense)),
        ("transformers grouped_mm, dense", under("grouped_mm", dense)),
    ):
        models[provider] = get_peft_model(Layer(experts), PeftConfig(lora_alpha=16, **ADAPTER))
    for name, factor in factors(ours).items():
        if name.endswith("lora_B"):
            nn.init.normal_(factor, std=0.02)
        for model in models.values():
            if model is not ours:
                factors(model)[name].data.copy_(to_file(name.rpartition(".")[2], factor.detach()))
    return models


def factors(model: nn.Module) -> dict[str, Tensor]:
    """lora_A and lora_B of each weight of the experts."""
    found = {}
    for name in ("gate_up_proj", "down_proj"):
        for module in model.modules():
            if isinstance(module, LoraExperts) and module is getattr(model.experts, name).stack:
                found |= {f"{name}.{part}": getattr(module, part)["default"] for part in ("lora_A", "lora_B")}
            elif getattr(module, "parameter_name", None) == name:  # PEFT's
                found |= {f"{name}.{part}": getattr(module, part)["default"].weight for part in ("lora_A", "lora_B")}
    return found


def weight_bytes(experts: nn.Module) -> int:
    found = {id(t): t for module in experts.modules() for t in (*module.parameters(False), *module.buffers(False))}
    states = (getattr(module, "quant_state", None) for module in experts.modules())  # bitsandbytes'
    for state in filter(None, states):
        nested = state.state2
        kept = (state.absmax, state.offset, *((nested.absmax,) if nested else ()))
        found |= {id(t): t for t in kept if isinstance(t, Tensor)}
    return sum(tensor.nbytes for tensor in found.values())


def call(experts: nn.Module, direction: str, x: Tensor, index: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return experts(x, index, weights)

    def forward_and_backward() -> Tensor:
        leaf = x.clone().requires_grad_()
        experts.zero_grad()
        experts(leaf, index, weights).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    return forward if direction == DIRECTIONS[0] else forward_and_backward


def results_of(experts: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """What the call gives, and the gradients of the adapter's factors."""
    # Else torch adds up the gradient of an index, as transformers gathers tokens, in any order in fp32.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = run().float()
    finally:
        torch.use_deterministic_algorithms(False)
    trained = {name: factor for name, factor in factors(experts).items() if factor.grad is not None}
    of_file = [to_file(name.rpartition(".")[2], factor.grad).clone() for name, factor in trained.items()]
    return [result, *of_file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default=NATIVE)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--seconds", type=float, default=2, help="of measuring for each provider of a case")
    parser.add_argument("--smoke", action="store_true", help="a tiny layer and no record, to see that it runs")
    args = parser.parse_args()
    sizes = SIZES
    if args.smoke:
        sizes, args.tokens, args.seconds = TINY, [1, 4], 0.01

    dtype = DTYPES[args.dtype]
    dense = dense_experts(sizes, dtype)
    providers = {
        "qlora_ext": in_4_bits(dense),
        "bitsandbytes parametrize": parametrized(dense),
        "transformers grouped_mm, dense": under("grouped_mm", dense),
        "transformers eager, dense": under("eager", dense),
    }
    of_direction = {each: adapted(dense) if "adapters" in each else providers for each in DIRECTIONS}
    rows: list[dict[str, Any]] = []
    for tokens, direction in product(args.tokens, DIRECTIONS):
        count, taken = sizes["num_experts"], min(TAKEN, sizes["num_experts"])
        inputs = []
        for _ in range(ROUTINGS):
            index = torch.stack([torch.randperm(count)[:taken] for _ in range(tokens)])
            x = torch.randn(tokens, sizes["hidden_size"], dtype=dtype)
            inputs.append((x, index, torch.rand(tokens, taken, dtype=dtype)))
        same = {"bench": "experts", **sizes, "taken": taken, "dtype": str(dtype)[6:]}
        calls, results = {}, {}
        for name, experts in of_direction[direction].items():
            try:
                once, again = (results_of(experts, call(experts, direction, *inputs[0])) for _ in range(2))
            except RuntimeError as error:
                if name == "qlora_ext":
                    raise
                row = {"provider": name, "tokens": tokens, "direction": direction}
                rows.append(same | row | {"refused": str(error).partition("\n")[0]})
            else:
                assert all(map(torch.equal, once, again)), name
                results[name] = once
                calls[name] = rotated([call(experts, direction, *each) for each in inputs])
        exact = results["transformers grouped_mm, dense"]
        for name, each in results.items():  # NF4 of normal weights is 9 % off
            for got, expected in zip(each, exact, strict=True):
                error = (got - expected).norm() / expected.norm()
                assert error < (0.25 if "dense" not in name else 0.02), (name, error)
        seconds = args.seconds * (4 if "adapters" in direction else 1)  # PEFT's calls take seconds
        for name, times in interleaved(calls, seconds=seconds).items():
            row = {"provider": name, "tokens": tokens, "direction": direction}
            rows.append(same | row | {"weight_bytes": weight_bytes(providers[name])} | percentiles(times))
    record.write("experts", rows, smoke=args.smoke)


if __name__ == "__main__":
    main()
