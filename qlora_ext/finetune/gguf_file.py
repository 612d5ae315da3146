"""A llama-architecture .gguf file as a Hugging Face checkpoint: config, tensors and tokenizer, with no network.

llama.cpp stores the rows of the query and key projections interleaved for its rotary embedding, [heads, head_dim/2,
2]; transformers expects [heads, 2, head_dim/2], so they are put back while reading.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from .model_folder import StoredTensor

CHUNK = 1 << 20  # elements decoded at a time: the decoder's temporaries are several times as large

# transformers splits a GGUF's text as GPT-2 does unless it knows the vocabulary; it does not know those learned on
# single digits.
GPT2_VOCABULARIES = ("default", "gpt-2")
SINGLE_DIGIT_VOCABULARIES = ("smollm", "starcoder", "refact", "command-r")


class _Reader(gguf.GGUFReader):
    """gguf's own reads beyond the end: slices there are empty, and an array of 10**15 numbers takes for ever."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise IndexError(f"expected {count} values at byte {offset}, got {len(values)}")
        return values


class GgufFile:
    """Reads one .gguf file; ValueError when it is damaged, of another architecture, or of a kind not handled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader = _Reader(path)
            _check_layout(self.reader)
        except (ValueError, KeyError, IndexError, OverflowError, OSError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable GGUF file, or a truncated one ({error})") from error
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ValueError(f'{path}: expected general.architecture "llama", got {architecture!r}')

    def config(self) -> LlamaConfig:
        """Build the model's config from the metadata."""
        config: LlamaConfig = self._read(self._config, "config")
        return config

    def _config(self) -> LlamaConfig:
        tensors = {tensor.name for tensor in self.reader.tensors}
        # Where there is a factor and no type, as in older files, llama.cpp scales linearly; by 0 it means not at all.
        factors = [self._field(f"llama.rope.{key}", 1) for key in ("scaling.factor", "scale_linear")]
        is_scaled = any(factor not in (0, 1) for factor in factors)
        scaling = self._field("llama.rope.scaling.type", "linear" if is_scaled else "none")
        if scaling != "none" or "rope_freqs.weight" in tensors:
            raise ValueError(f"{self.path}: scaled rotary embeddings are not handled; use the Hugging Face folder")
        if self._field("llama.expert_count", 0):
            raise ValueError(f"{self.path}: mixture-of-experts files are not handled; use the Hugging Face folder")
        heads = self._field("llama.attention.head_count")
        hidden = self._field("llama.embedding_length")
        return LlamaConfig(
            vocab_size=self._field("llama.vocab_size", None) or len(self._field("tokenizer.ggml.tokens")),
            hidden_size=hidden,
            intermediate_size=self._field("llama.feed_forward_length"),
            num_hidden_layers=self._field("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._field("llama.attention.head_count_kv", heads),
            head_dim=self._field("llama.attention.key_length", hidden // heads),
            max_position_embeddings=self._field("llama.context_length"),
            rope_parameters={"rope_type": "default", "rope_theta": self._field("llama.rope.freq_base", 10000.0)},
            rms_norm_eps=self._field("llama.attention.layer_norm_rms_epsilon"),
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=self._field("tokenizer.ggml.bos_token_id", None),
            eos_token_id=self._field("tokenizer.ggml.eos_token_id", None),
        )

    def decoder(self) -> None:
        """None: `tensors` decodes them."""

    def tensors(self, model: PreTrainedModel) -> Iterator[StoredTensor]:
        """Yield every tensor of the file under the name it has in `model`."""
        config = model.config
        name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        names = {name_map.get_name(name, try_suffixes=(".weight",)): name for name in model.state_dict()}
        heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
        for tensor in self.reader.tensors:
            leaf = tensor.name.split(".", 2)[-1]
            if tensor.name.endswith(".bias"):
                raise ValueError(f"{self.path}: biases ({tensor.name}) are not handled; use the Hugging Face folder")
            shape = tuple(int(size) for size in reversed(tensor.shape))
            read = partial(_decode, tensor, shape, heads.get(leaf), str(self.path))
            yield StoredTensor(names.get(tensor.name, tensor.name), shape, read)

    def generation_config(self) -> None:
        """None: what there is in the metadata is in the config."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Build the tokenizer, chat template included, from the metadata."""
        tokenizer: PreTrainedTokenizerBase = self._read(self._tokenizer, "tokenizer")
        return tokenizer

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        split = self._field("tokenizer.ggml.pre", "default") if self._field("tokenizer.ggml.model") == "gpt2" else None
        if split not in (None, *GPT2_VOCABULARIES, *SINGLE_DIGIT_VOCABULARIES, *GGUF_PRE_TOKENIZER_SPLITS):
            raise ValueError(
                f"{self.path}: how its tokenizer splits text ({split!r}) is not known; use the Hugging Face folder"
            )
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            self.path.parent, gguf_file=self.path.name, local_files_only=True
        )
        if split in SINGLE_DIGIT_VOCABULARIES:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        return tokenizer

    def _read(self, read: Callable[[], Any], what: str) -> Any:
        try:
            return read()
        except Exception as error:  # of metadata of other kinds: whatever transformers' classes make of them
            if isinstance(error, ValueError) and str(error).startswith(str(self.path)):
                raise
            raise ValueError(f"{self.path}: expected the metadata of a {what}, got {error!r}") from error

    def _field(self, key: str, *default: Any) -> Any:
        field = self.reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self.path}: expected the metadata key {key!r}, got none")


def _check_layout(reader: gguf.GGUFReader) -> None:
    """That the tensors follow each other, in their order and aligned, as llama.cpp writes and wants them."""
    if reader.byte_order != "I":  # of which gguf takes tensors' bytes as they lie
        raise ValueError("of the other byte order")
    expected, unit = reader.data_offset, int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.data_offset != expected:
            raise ValueError(f"tensor {tensor.name!r}: expected it at byte {expected}, got {tensor.data_offset}")
        expected += -(-int(tensor.n_bytes) // unit) * unit


def _decode(tensor: Any, shape: tuple[int, ...], heads: int | None, path: str, dtype: torch.dtype | None) -> Tensor:
    out = torch.empty(shape, dtype=dtype or torch.float32)
    rows = max(1, CHUNK * len(out) // out.numel())
    try:
        for start in range(0, len(out), rows):
            chunk = gguf.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
            out[start : start + rows] = torch.from_numpy(chunk.copy())
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: tensor {tensor.name!r} is stored as {tensor.tensor_type.name}, not handled"
        ) from error
    if heads is None:
        return out
    return out.view(heads, shape[0] // heads // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
