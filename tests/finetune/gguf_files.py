"""Llama models written as llama.cpp stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order: row 2 i of a head is its row i, row 2 i + 1 is its row i + head_dim / 2."""
    rows = []
    for head in weight.chunk(heads):
        half = len(head) // 2
        for row in range(half):
            rows += [head[row], head[row + half]]
    return torch.stack(rows)


def write_gguf(path: Path, model: LlamaForCausalLM, quantized: bool = False, **metadata: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(config.head_dim)
    if metadata.pop("rope_freqs", False):
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        rows = (interleaved(weight, heads) if heads else weight).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and rows.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), gguf.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
