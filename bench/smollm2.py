"""The language model of the benches: from a file, of SmolLM2-135M's shape with random weights, or tiny."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

DEMO = Path(__file__).parent.parent / "build" / "demo" / "model.gguf"
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
TINY = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_hidden_layers=2, vocab_size=99)


def load(source: str | None, *, dtype: torch.dtype, tiny: bool) -> PreTrainedModel:
    """The model in this dtype: `tiny`, or of this .gguf or folder, or with random weights (seed 0) for None."""
    if source is not None and not tiny:
        from qlora_ext.finetune.load import load_model, open_checkpoint

        return load_model(open_checkpoint(source), dtype=dtype, device=torch.device("cpu"))
    torch.manual_seed(0)
    return LlamaForCausalLM(TINY if tiny else SMOLLM2).to(dtype)


def name(source: str | None, *, tiny: bool) -> str:
    """What a row says the model is."""
    if tiny:
        return "tiny"
    return Path(source).resolve().name if source else "random, SmolLM2-135M"
