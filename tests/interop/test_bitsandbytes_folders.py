"""Folders in bitsandbytes' format: read and written bit for bit, with bitsandbytes itself as the peer."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from cases import DTYPES
from reference import assert_as_exact_as_torch, assert_same
from safetensors.torch import load_file, save_file
from tiny_model import one_thread as one_thread
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_ext import Linear4bit, LoraConfig, add_adapter, quantize_model
from qlora_ext.interop import bitsandbytes as folders
from qlora_ext.interop.transformers import NF4Config

IDS = torch.arange(2, 18)[None]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 200}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
STORAGE = {"uint8": torch.uint8, **DTYPES}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {**SIZES, **HEADS, "tie_word_embeddings": True}),
    "rows-not-blocks": ("Llama", {**SIZES, **HEADS, "intermediate_size": 200}),
    "conv1d": ("GPT2", GPT2),
    "kept-in-fp32": ("T5", {**T5, "decoder_start_token_id": 0, "pad_token_id": 0}),
    "dense-experts": ("Mixtral", {**SIZES, **HEADS, "num_local_experts": 4}),
    "renamed": ("Qwen2Moe", {**SIZES, **HEADS, "num_experts": 4, "moe_intermediate_size": 64}),
}
AUTO = {"T5": transformers.AutoModelForSeq2SeqLM}


def dense_folder(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**(config or {**SIZES, **HEADS}))
    AUTO.get(kind, AutoModelForCausalLM).from_config(made, dtype=dtype).save_pretrained(folder / "dense")
    return folder / "dense"


def theirs(folder: Path, kind: str = "Llama", **how: Any) -> Any:
    """The model with bitsandbytes' layers, in training mode: evaluating rewrites their bytes on some processors."""
    config = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **how)} if how else {}
    model: Any = AUTO.get(kind, AutoModelForCausalLM).from_pretrained(folder, device_map={"": "cpu"}, **config)
    return model.train()


def ours(folder: Path, **config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(**config))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_files(got: Path, expected: Path) -> None:
    left, right = stored(got), stored(expected)
    assert left.keys() == right.keys()
    for name, tensor in right.items():  # as bytes: floats may be NaN, and -0.0 is not 0.0
        assert (left[name].dtype, left[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(left[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def assert_same_weights(their: Any, our: Any) -> None:
    """The decoded weights of all 4-bit layers are equal, bit for bit."""
    layers = {name: layer for name, layer in our.named_modules() if isinstance(layer, Linear4bit)}
    others = {n: m.weight for n, m in their.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert layers.keys() == others.keys()
    for name, weight in others.items():
        decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert_same(layers[name].dequantize(), decoded)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def dense_logits(model: Any, dtype: torch.dtype) -> Tensor:
    """Of the same model in plain PyTorch with the decoded weights."""
    dense = type(model)._from_config(transformers.LlamaConfig(**SIZES, **HEADS), dtype=torch.float32)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in dense.state_dict()}
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    decode = torch.float32 if dtype == torch.float64 else dtype
    dense.load_state_dict(state | {f"{name}.weight": layer.dequantize(decode) for name, layer in layers})
    return logits(dense.to(dtype))


@pytest.mark.parametrize("is_sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize(
    ("nested", "quant_type", "storage"),
    list(product((True, False), ("nf4", "fp4"), STORAGE)),
    ids=lambda value: str(value),
)
def test_every_byte_arrives_and_returns(
    nested: bool, quant_type: str, storage: str, is_sharded: bool, tmp_path: Path
) -> None:
    size = "60KB" if is_sharded else "1GB"
    how = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_quant_storage": STORAGE[storage]}
    peer = theirs(dense_folder(tmp_path), bnb_4bit_use_double_quant=nested, **how)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == is_sharded
    model = folders.load_folder(tmp_path / "theirs")
    files = stored(tmp_path / "theirs")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 14
    for name, layer in layers:
        at, shape = f"{name}.weight", [layer.out_features, layer.in_features]
        assert layer.weight.shape == (shape[0], shape[1] // 2)
        assert torch.equal(layer.weight.flatten(), files[at].view(torch.uint8).flatten())
        assert layer.absmax.shape == (shape[0], shape[1] // 64)
        assert_same(layer.absmax.detach().flatten(), files[f"{at}.absmax"])
        about = json.loads(bytes(files[f"{at}.quant_state.bitsandbytes__{quant_type}"].tolist()))
        assert (about["shape"], about["dtype"]) == (shape, "bfloat16")
        assert layer.dtype is torch.bfloat16
        if nested:
            assert_same(layer.nested_absmax, files[f"{at}.nested_absmax"])
            assert_same(layer.nested_offset, torch.tensor(about["nested_offset"], dtype=torch.float32))
        else:
            assert layer.nested_absmax is None
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"]
    assert_same_weights(peer, model)
    folders.save_folder(model, tmp_path / "ours", max_shard_size=size, quant_storage=STORAGE[storage])
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_as_exact_as_those_of_the_decoded_model(dtype: torch.dtype, tmp_path: Path) -> None:
    peer = theirs(dense_folder(tmp_path, dtype=dtype), bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    peer.save_pretrained(tmp_path / "theirs")
    model = folders.load_folder(tmp_path / "theirs", dtype=dtype)
    folders.save_folder(model, tmp_path / "ours")
    y, exact = dense_logits(model, dtype), dense_logits(model, torch.float64)
    for each in (model, peer, theirs(tmp_path / "ours")):
        assert_as_exact_as_torch(logits(each), y, exact)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(name: str, tmp_path: Path) -> None:
    kind, config = MODELS[name]
    peer = theirs(dense_folder(tmp_path, kind, **config), kind, bnb_4bit_use_double_quant=True)
    peer.save_pretrained(tmp_path / "theirs")
    model = folders.load_folder(tmp_path / "theirs", model_class=AUTO.get(kind))
    assert_same_weights(peer, model)
    for key, tensor in model.state_dict().items():
        assert key not in peer.state_dict() or tensor.dtype == torch.uint8 or tensor.equal(peer.state_dict()[key])
    folders.save_folder(model, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert_same_weights(theirs(tmp_path / "ours", kind), model)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_ours_of_any_blocksize_load_there_and_return(blocksize: int, tmp_path: Path) -> None:
    """Theirs quantizes in blocks of 64 alone, but takes what the file says."""
    model = ours(dense_folder(tmp_path), blocksize=blocksize)
    folders.save_folder(model, tmp_path / "ours", max_shard_size="60KB")
    peer = theirs(tmp_path / "ours")
    assert_same_weights(peer, model)
    if blocksize <= 128:  # on some processors theirs decodes wrongly where a block reaches into the next row
        exact = dense_logits(model, torch.float64)
        assert_as_exact_as_torch(logits(peer), dense_logits(model, torch.bfloat16), exact)
    # By default transformers wants to undo what it did at loading, and for bitsandbytes' format it cannot.
    peer.save_pretrained(tmp_path / "again", save_original_format=False)
    assert_same_files(tmp_path / "again", tmp_path / "ours")
    again = folders.load_folder(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert_same(again.state_dict()[name], tensor)


def test_a_model_of_quantize_model_and_mixed_layers(tmp_path: Path) -> None:
    """bitsandbytes reads blocksize and quant_type of each layer; NF4Config has one of each."""
    model = quantize_model(AutoModelForCausalLM.from_pretrained(dense_folder(tmp_path)), skip=["lm_head", "o_proj"])
    attention = model.model.layers[0].self_attn
    attention.q_proj = Linear4bit.from_linear(attention.o_proj, quant_type="fp4", blocksize=128, double_quant=False)
    folders.save_folder(model, tmp_path / "mixed")
    assert_same_weights(theirs(tmp_path / "mixed"), model)
    at = "model.safetensors: model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__fp4: expected {'quant_"
    with pytest.raises(ValueError, match=f"^bitsandbytes.load_folder: {at}.*'blocksize': 128, 'double_quant': False"):
        folders.load_folder(tmp_path / "mixed")


def test_other_classes_of_the_model(tmp_path: Path) -> None:
    model = ours(dense_folder(tmp_path))
    folders.save_folder(model, tmp_path / "ours")
    base = folders.load_folder(tmp_path / "ours", model_class=transformers.AutoModel)
    assert_same(base(IDS)[0], model.model(IDS)[0])
    tensors = stored(tmp_path / "ours")  # older checkpoints have the names of the base model
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "ours" / "model.safetensors")
    assert_same(logits(folders.load_folder(tmp_path / "ours")), logits(model))
    kind = transformers.LlamaForSequenceClassification
    classifier = folders.load_folder(tmp_path / "ours", model_class=kind, num_labels=3, dtype=torch.float32)
    assert classifier.score.weight.shape == (3, 128)
    assert classifier.score.weight.dtype == torch.float32
    assert classifier.config.quantization_config.modules_to_not_convert == ["score"]
    classifier.save_pretrained(tmp_path / "own")
    again = kind.from_pretrained(tmp_path / "own")
    assert_same(again(IDS).logits, classifier(IDS).logits)


def test_what_bitsandbytes_cannot_hold(tmp_path: Path) -> None:
    def refused(model: Any, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=f"^bitsandbytes.save_folder: {message}"):
            folders.save_folder(model, tmp_path / "new", **options)
        assert not list(tmp_path.glob("new*"))

    kind, config = MODELS["dense-experts"]
    refused(ours(dense_folder(tmp_path, kind, **config)), r"model.layers.0.mlp.experts.*: .*, got fused experts")
    dense = AutoModelForCausalLM.from_pretrained(dense_folder(tmp_path))
    refused(dense, "model: expected layers in 4 bits, got none")
    refused(torch.nn.Linear(64, 64), "model: expected one of transformers', got Linear", TypeError)
    model = ours(tmp_path / "dense")
    refused(model, "quant_storage: expected one of .*, got torch.int8", quant_storage=torch.int8)
    add_adapter(model, LoraConfig(r=2))
    refused(model, r"model.layers.0.self_attn.q_proj.base_layer: expected a model without adapters")


def test_files_are_replaced_whole_and_no_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(dense_folder(tmp_path))
    with pytest.raises(ValueError, match=r"dense: expected no other model in it, got config.json$"):
        folders.save_folder(model, tmp_path / "dense")
    new = tmp_path / "new"
    with monkeypatch.context() as broken:
        broken.setattr(folders, "write_shard", lambda path, tensors: path.write_bytes(b"half") / 0)
        with pytest.raises(ZeroDivisionError):
            folders.save_folder(model, new)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    folders.save_folder(model, new, max_shard_size="60KB")
    before = {path.name: path.read_bytes() for path in new.iterdir()}
    with monkeypatch.context() as broken:
        broken.setattr(folders, "write_shard", lambda path, tensors: path.write_bytes(b"half") / 0)
        with pytest.raises(ZeroDivisionError):
            folders.save_folder(model, new)
    assert {path.name: path.read_bytes() for path in new.iterdir()} == before
    (new / "tokenizer.json").write_text("{}")
    folders.save_folder(folders.load_folder(new), new)
    left = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in new.iterdir()} == left
    assert_same(logits(folders.load_folder(new)), logits(model))


MEASURE = """
import sys, threading, torch
from qlora_ext.interop import bitsandbytes

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

small = bitsandbytes.load_folder(sys.argv[2])
before = anonymous()
peak, done = [before], threading.Event()
threading.Thread(target=watch, daemon=True).start()
model = bitsandbytes.load_folder(sys.argv[1])
bitsandbytes.save_folder(model, sys.argv[1] + "-again")
done.set()
tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
print(peak[0] - before, sum(tensors.values()), max(tensors.values()))
"""


def test_memory_is_that_of_the_model_and_two_tensors(tmp_path: Path) -> None:
    small = dense_folder(tmp_path / "small")
    folders.save_folder(ours(small), tmp_path / "few")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 4000}
    large = dense_folder(tmp_path / "large", **sizes, num_attention_heads=8)
    folders.save_folder(ours(large), tmp_path / "many", max_shard_size="20MB")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "many"), str(tmp_path / "few")]
    child = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    growth, model, largest = map(int, child.stdout.split())
    assert model > 60e6
    assert growth <= model + 2 * largest + 4e6
