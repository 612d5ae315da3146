"""NF4Config in from_pretrained and save_pretrained, over the ideas of transformers' own tests of a 4-bit quantizer."""

from __future__ import annotations

import copy
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging

import qlora_ext
from qlora_ext import Linear4bit, NF4Config, quantize_model
from qlora_ext.experts import Experts4bit
from qlora_ext.weight_4bit import Weight4bit

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**WIDTHS, "num_key_value_heads": 2, "vocab_size": 200}
MOE = {**LLAMA, "num_experts_per_tok": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 200}
GPT2 = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=200, **TOKENS)
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**LLAMA)),
    "llama-tied": (AutoModelForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": (AutoModelForCausalLM, GPT2),
    "opt": (AutoModelForCausalLM, OPTConfig(**WIDTHS, ffn_dim=256, word_embed_proj_dim=128, vocab_size=200, **TOKENS)),
    "bloom": (AutoModelForCausalLM, BloomConfig(hidden_size=128, n_layer=2, n_head=4, vocab_size=200, **TOKENS)),
    "falcon": (AutoModelForCausalLM, FalconConfig(**WIDTHS, vocab_size=200, **TOKENS)),
    "mixtral": (AutoModelForCausalLM, MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3-moe": (AutoModelForCausalLM, Qwen3MoeConfig(**MOE, moe_intermediate_size=64, num_experts=4, head_dim=32)),
    "gpt-oss": (AutoModelForCausalLM, GptOssConfig(**MOE, num_local_experts=4, head_dim=32)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(**T5, decoder_start_token_id=0)),
    "flan-t5": (AutoModelForSeq2SeqLM, T5Config(**T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu")),
    "classifier": (AutoModelForSequenceClassification, LlamaConfig(**LLAMA, pad_token_id=0)),
    "bert": (AutoModelForSequenceClassification, BertConfig(**WIDTHS, vocab_size=200)),
    "bert-mlm": (AutoModelForMaskedLM, BertConfig(**WIDTHS, vocab_size=200)),
    "vit": (AutoModelForImageClassification, ViTConfig(**WIDTHS, image_size=32, patch_size=8)),
}
CAUSAL = [name for name, (kind, _) in MODELS.items() if kind is AutoModelForCausalLM]


@pytest.fixture(autouse=True)
def told() -> Iterator[None]:
    """What transformers logs reaches caplog."""
    transformers_logging.enable_propagation()
    yield
    transformers_logging.disable_propagation()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several files for each model."""
    root = tmp_path_factory.mktemp("models")
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        model = kind.from_config(copy.deepcopy(config))
        for parameter in model.parameters():  # biases, too, are zeros when new
            nn.init.normal_(parameter, std=0.1) if parameter.dim() != 1 else parameter.data.add_(0.01)
        model.save_pretrained(root / name, max_shard_size="200KB")
    return root


def load(folder: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return MODELS[name][0].from_pretrained(folder / name, dtype=dtype, quantization_config=NF4Config(**options))


@torch.no_grad()
def output(model: Any) -> Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    if model.main_input_name == "pixel_values":
        draw = torch.Generator().manual_seed(0)
        return model.eval()(torch.randn(2, 3, 32, 32, generator=draw).to(model.dtype)).logits
    return model.eval()(input_ids=ids, **given).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_is_what_quantize_model_makes(name: str, dtype: torch.dtype, folders: Path) -> None:
    expected = quantize_model(MODELS[name][0].from_pretrained(folders / name, dtype=dtype))
    model = load(folders, name, dtype)
    assert {n for n, m in model.named_modules() if isinstance(m, Weight4bit)} == {
        n for n, m in expected.named_modules() if isinstance(m, Weight4bit)
    }
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert torch.equal(output(model), output(expected))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double_quant": False, "blocksize": 32}])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_bit_for_bit(
    name: str, options: dict[str, Any], folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders, name, torch.bfloat16, **options)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with caplog.at_level("WARNING"):
        again, info = MODELS[name][0].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not caplog.records
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert again.get_memory_footprint() == model.get_memory_footprint()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_bytes_are_counted(name: str, folders: Path) -> None:
    dense, model = MODELS[name][0].from_pretrained(folders / name), load(folders, name)
    for arguments in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**arguments) == dense.num_parameters(**arguments)
    layers = [m for m in model.modules() if isinstance(m, Weight4bit)]
    stored = sum(t.nbytes for layer in layers for t in layer._storage().values())
    replaced = sum(layer.in_features * layer.out_features for layer in layers) * 4
    assert model.get_memory_footprint() == dense.get_memory_footprint() - replaced + stored
    assert stored < 0.15 * replaced
    assert copy.deepcopy(model).num_parameters() == dense.num_parameters()


@pytest.mark.parametrize("name", MODELS)
def test_dequantize_leaves_an_ordinary_model(name: str, folders: Path, tmp_path: Path) -> None:
    model = load(folders, name)
    expected = output(model)
    dense = model.dequantize()
    torch.testing.assert_close(output(dense), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, (Weight4bit, Experts4bit)) for m in dense.modules())
    assert not dense.is_quantized
    for trace in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit"):
        assert not hasattr(dense, trace), trace
    assert not hasattr(dense.config, "quantization_config")
    assert dense.num_parameters() == MODELS[name][0].from_pretrained(folders / name).num_parameters()
    dense.save_pretrained(tmp_path)
    again = MODELS[name][0].from_pretrained(tmp_path)
    assert torch.equal(output(again), output(dense))
    assert dense.to(torch.bfloat16).dtype == torch.bfloat16


def test_heads_stay_dense_and_what_the_files_lack_trains(folders: Path, tmp_path: Path) -> None:
    """BERT's files of a masked language model have no pooler and no classifier: both are new, in full precision."""
    model = AutoModelForSequenceClassification.from_pretrained(folders / "bert-mlm", quantization_config=NF4Config())
    assert type(model.classifier) is type(model.bert.pooler.dense) is nn.Linear
    assert model.bert.pooler.dense.weight.std() > 0.01
    assert isinstance(model.bert.encoder.layer[0].output.dense, Linear4bit)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(output(again), output(model))


def test_t5_keeps_wo_in_float32(folders: Path) -> None:
    model = load(folders, "t5", torch.float16)
    block = model.decoder.block[0].layer
    assert block[-1].DenseReluDense.wo.weight.dtype == torch.float32
    assert isinstance(block[0].SelfAttention.q, Linear4bit)


@pytest.mark.parametrize("names", [["mlp"], ["model.layers.0", "lm_head"], ["q_proj", "lm_head"]])
def test_modules_to_not_convert(names: list[str], folders: Path, tmp_path: Path) -> None:
    model = load(folders, "llama", modules_to_not_convert=names)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            left = any(f".{each}." in f".{name}." for each in names)
            assert isinstance(module, Linear4bit) != left, name
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path)), output(model))


def test_a_misspelt_module_is_told(folders: Path) -> None:
    with pytest.warns(UserWarning, match="qproj"):
        load(folders, "llama", modules_to_not_convert=["qproj"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quant_type": "int4"}, "quant_type"),
        ({"quant_type": 4}, "quant_type"),
        ({"blocksize": 48}, "blocksize"),
        ({"blocksize": 2**70}, "blocksize"),
        ({"blocksize": "64"}, "blocksize"),
        ({"double_quant": 1}, "double_quant"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type"),
        ({"quant_method": "gptq"}, "quant_method"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        NF4Config(**options)


def test_nan_in_a_weight_names_the_layer(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / "llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    assert "layers.1.mlp.up_proj.weight: quantize_4bit: weight: expected finite values, got NaN" in caplog.text


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{Q}.nested_absmax"), f"{Q}.nested_absmax: expected it beside"),
        (lambda t: t.pop(f"{Q}.weight"), f"{Q}.weight: expected it beside"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)], f"{Q}.weight: expected it in the"),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:64].clone()}), f"{Q}.weight: expected torch.uint8"),
        (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"].float()}), f"{Q}.absmax: expected torch.uint8"),
        (lambda t: t.update({f"{Q}.nested_absmax": t[f"{Q}.nested_absmax"].half()}), f"{Q}.nested_absmax: expected"),
        (None, "expected"),
    ],
    ids=["nested", "codes", "layer", "shape", "scales", "half", "truncated"],
)
def test_a_damaged_folder_is_told_by_file_and_key(change: Any, named: str, folders: Path, tmp_path: Path) -> None:
    load(folders, "llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if change is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        rewrite(path, change)
    with pytest.raises(ValueError, match=re.escape(named)) as told:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.safetensors" in str(told.value) or "layer" in str(told.value)


def test_the_config_is_json_and_registers_once(folders: Path) -> None:
    model = load(folders, "llama", blocksize=128)
    for config in (model.config.to_dict(), json.loads(model.config.to_json_string())):
        assert config["quantization_config"]["quant_method"] == "qlora_ext"
        assert config["quantization_config"]["blocksize"] == 128
    model.config.to_diff_dict()
    before = dict(AUTO_QUANTIZER_MAPPING)
    importlib.reload(sys.modules[NF4Config.__module__])
    assert before == AUTO_QUANTIZER_MAPPING


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map: Any, folders: Path) -> None:
    config = NF4Config()
    model = AutoModelForCausalLM.from_pretrained(folders / "llama", quantization_config=config, device_map=device_map)
    assert torch.equal(output(model), output(load(folders, "llama")))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_disk_is_refused(folders: Path) -> None:
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="disk"):
        AutoModelForCausalLM.from_pretrained(folders / "llama", quantization_config=NF4Config(), device_map=places)


def test_casts_as_transformers_has_them(folders: Path) -> None:
    model = load(folders, "llama")
    with pytest.raises(ValueError, match="half"):
        model.half()
    model.to(torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.nested_absmax.dtype) == (torch.uint8, torch.float32)
    assert output(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_is_that_of_the_dequantized_model(name: str, folders: Path) -> None:
    model = load(folders, name)
    dense = copy.deepcopy(model).dequantize()
    ids = torch.arange(3, 11)[None]
    tokens = [m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, dense)]
    assert torch.equal(*tokens)
    assert tokens[0].shape[1] > ids.shape[1]


def test_a_bare_4_bit_model_is_not_drawn_anew(folders: Path) -> None:
    """transformers' init_weights, and torch's reset_parameters, would write over the codes."""
    model = load(folders, "llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    with pytest.raises(TypeError, match="reset_parameters"):
        model.model.layers[0].mlp.up_proj.reset_parameters()


def test_a_script_that_does_not_import_it_is_told(folders: Path, tmp_path: Path) -> None:
    load(folders, "llama").save_pretrained(tmp_path)
    load_it = "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(r'{}')"
    run = [sys.executable, "-c", load_it.format(tmp_path)]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert "qlora_ext" in result.stderr
    assert result.returncode != 0
    run[-1] = f"from qlora_ext import NF4Config; {run[-1]}; assert m.is_loaded_in_4bit"
    subprocess.run(run, check=True, capture_output=True)


def test_num_parameters_needs_no_bitsandbytes(folders: Path) -> None:
    """transformers asks bitsandbytes for its class when a model is marked as one in 4 bits."""
    model = load(folders, "llama")
    assert model.is_loaded_in_4bit
    hidden = {"bitsandbytes": None}
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "bitsandbytes"}
    sys.modules.update(hidden)
    try:
        assert model.num_parameters() > 300_000
    finally:
        del sys.modules["bitsandbytes"]
        sys.modules.update(kept)


PEAK = """
import sys, threading, torch
from transformers import AutoModelForCausalLM
from qlora_ext import NF4Config
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
torch.ops.qlora_ext.quantize_4bit(torch.ones(64), "nf4", 64)
before, seen, done = anonymous(), [], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(anonymous())
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=NF4Config())
done.set()
thread.join()
print(max(seen) - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_4_bit_model_and_two_tensors(tmp_path: Path) -> None:
    """Of the process's own memory: pages of the files, which are mapped, are the system's to drop."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=32, vocab_size=1000)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    dense = model.get_memory_footprint()
    largest = max(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    del model
    run = [sys.executable, "-c", PEAK, str(tmp_path)]
    peak, footprint = map(int, subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    limit = footprint + 2 * largest + 300 * 2**20
    assert limit < dense
    assert peak <= limit, f"{peak / 2**20:.0f} MiB, of which {footprint / 2**20:.0f} are the model"


def test_the_package_still_imports_no_transformers() -> None:
    code = "import sys, qlora_ext; assert not {'transformers', 'peft'} & set(sys.modules); qlora_ext.NF4Config"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'peft' in sys.modules"], check=True)
    with pytest.raises(AttributeError, match="NF5Config"):
        qlora_ext.NF5Config  # noqa: B018


def test_files_hold_the_codes_and_no_float_weight(folders: Path, tmp_path: Path) -> None:
    load(folders, "mixtral", torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    codes = [t for key, t in tensors.items() if "_proj" in key and key.endswith((".weight", ".absmax"))]
    assert {t.dtype for t in codes} == {torch.uint8}
    assert len(codes) == 2 * 2 * (4 + 2)  # in two layers: of four projections, and of two weights of experts
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "qlora_ext"
