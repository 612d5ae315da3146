"""A llama of two layers with a tokenizer of 256 bytes: everything a fine-tuning run needs, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qlora_ext.finetune.load import load_model, open_checkpoint

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: str | dict[str, str] | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte; it pads with its end-of-turn token, as SmolLM2 does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


def tiny_config(**changes: object) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 258}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, **changes})


def save_tiny_model(folder: Path, *, max_shard_size: str = "1GB", **changes: object) -> LlamaForCausalLM:
    """Save model and tokenizer as a Hugging Face folder; return the model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return model


def load(source: Path, dtype: torch.dtype = torch.float32, quantize: dict[str, Any] | None = None) -> PreTrainedModel:
    return load_model(open_checkpoint(str(source)), dtype=dtype, device=torch.device("cpu"), quantize=quantize)


def assert_same_model(got: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(got(ids).logits, expected(ids).logits, rtol=0, atol=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on a tensor this small only wait for each other, and long when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
