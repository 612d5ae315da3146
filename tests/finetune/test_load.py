from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from stored_models import QUANTIZE, edit
from tiny_model import assert_same_model, load, save_tiny_model
from tiny_model import one_thread as one_thread
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

import qlora_ext
from qlora_ext.finetune.load import compute_dtype, load_model, open_checkpoint, suitable_attention
from qlora_ext.finetune.model_folder import ModelFolder

CPU = torch.device("cpu")


def test_attention_is_the_one_asked_for(tmp_path: Path) -> None:
    """With the same result but for rounding."""
    save_tiny_model(tmp_path)
    ids = torch.arange(60).reshape(2, 30)
    logits = []
    for kind in ("sdpa", "eager"):
        model = load_model(open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU, attention=kind)
        assert model.config._attn_implementation == kind
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits)


def test_attention_for_short_examples() -> None:
    assert suitable_attention(torch.bfloat16, CPU, 128) == "eager"
    assert suitable_attention(torch.bfloat16, CPU, 129) is None
    assert suitable_attention(torch.float32, CPU, 128) is None
    assert suitable_attention(torch.bfloat16, torch.device("cuda"), 128) is None


def test_only_a_package_of_the_attention_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)

    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("needs a package")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", lacking)
    for kind in (None, "eager"):  # which need none
        with pytest.raises(ImportError, match="needs a package"):
            load_model(open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU, attention=kind)
    with pytest.raises(ValueError, match="--attention flash_attention_2: needs a package"):
        load_model(open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU, attention="flash_attention_2")


@pytest.mark.parametrize("change", [{"hidden_act": "none"}, {"intermediate_size": -1}])
def test_a_config_of_which_no_model_can_be_built(tmp_path: Path, change: dict[str, Any]) -> None:
    save_tiny_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for attention in (None, "eager"):  # which a run may have chosen
        with pytest.raises(ValueError, match=f"{tmp_path}: expected a config of a model that can be built, got [A-Z]"):
            load_model(open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU, attention=attention)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard", ["1GB", "50KB"], ids=["one file", "shards"])
def test_folder_gives_the_saved_model(tmp_path: Path, tied: bool, shard: str) -> None:
    saved = save_tiny_model(tmp_path, tie_word_embeddings=tied, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    assert ModelFolder(tmp_path).files == sorted(tmp_path.glob("*.safetensors"))
    model = load(tmp_path)
    assert_same_model(model, saved)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training


def test_later_changes_of_the_file_do_not_reach_the_model(tmp_path: Path) -> None:
    saved = save_tiny_model(tmp_path)
    model = load(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    assert_same_model(model, saved)


def test_tied_head_may_be_stored_in_place_of_the_embedding(tmp_path: Path) -> None:
    saved = save_tiny_model(tmp_path)
    edit(tmp_path, model__embed_tokens__weight=None, lm_head__weight=saved.lm_head.weight.detach())
    assert_same_model(load(tmp_path), saved)


def test_dtype_is_that_of_the_load(tmp_path: Path) -> None:
    saved = save_tiny_model(tmp_path)
    model = load(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.norm.weight, saved.model.norm.weight.bfloat16())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, saved.model.rotary_emb.inv_freq)


def test_buffers_that_no_file_holds_are_those_of_transformers(tmp_path: Path) -> None:
    """GPT-J's positions above 256 have no place in bfloat16."""
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "rotary_dim": 16, "vocab_size": 258, "n_positions": 2048}
    GPTJForCausalLM(GPTJConfig(**sizes)).save_pretrained(tmp_path)
    expected = dict(GPTJForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_buffers())
    got = dict(load(tmp_path, torch.bfloat16).named_buffers())
    assert got.keys() == expected.keys() != set()
    for name, buffer in expected.items():
        torch.testing.assert_close(got[name], buffer, rtol=0, atol=0, msg=name)


def test_model_saved_without_its_head(tmp_path: Path) -> None:
    saved = save_tiny_model(tmp_path)
    saved.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_model(load(tmp_path), saved)
    assert isinstance(load(tmp_path, quantize=QUANTIZE).model.layers[0].mlp.up_proj, qlora_ext.Linear4bit)


@pytest.mark.filterwarnings("error:.*left out")
def test_what_older_versions_stored_and_the_model_computes_is_left_out(tmp_path: Path) -> None:
    saved = save_tiny_model(tmp_path / "llama")
    edit(tmp_path / "llama", model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert_same_model(load(tmp_path / "llama"), saved)
    sizes = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
    neo = GPTNeoForCausalLM(GPTNeoConfig(**sizes, vocab_size=258)).eval()
    neo.save_pretrained(tmp_path / "neo")
    attention = "transformer__h__0__attn__attention__"
    masks = {f"{attention}bias": torch.zeros(1, 1, 4, 4), f"{attention}masked_bias": torch.tensor(-1e9)}
    edit(tmp_path / "neo", **masks)
    assert_same_model(load(tmp_path / "neo"), neo)
    neo.transformer.save_pretrained(tmp_path / "neo")  # without the prefix of the head's model, nor its config
    neo.config.save_pretrained(tmp_path / "neo")
    edit(tmp_path / "neo", **{name.removeprefix("transformer__"): value for name, value in masks.items()})
    assert_same_model(load(tmp_path / "neo"), neo)
    edit(tmp_path / "neo", **{f"{attention}other_bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown tensor 'transformer\.h\.0\.attn\.attention\.other_bias'"):
        load(tmp_path / "neo")


@pytest.mark.parametrize("double_quant", [True, False])
def test_linears_are_quantized_from_the_stored_weight(tmp_path: Path, double_quant: bool) -> None:
    saved = save_tiny_model(tmp_path, tie_word_embeddings=False)
    model = load(tmp_path, torch.bfloat16, {**QUANTIZE, "double_quant": double_quant})
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, qlora_ext.Linear4bit)}
    assert len(quantized) == 14
    for name, module in quantized.items():
        weight = saved.get_submodule(name).weight.detach()
        packed, state = qlora_ext.quantize_4bit(weight, double_quant=double_quant)
        expected = qlora_ext.dequantize_4bit(packed, state, torch.float32)
        torch.testing.assert_close(module.dequantize(torch.float32), expected, rtol=0, atol=0, msg=name)
        assert module.dequantize().dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight.bfloat16())
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_unknown_missing_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    key = name.replace(".", "__")
    weight = save_tiny_model(tmp_path).get_parameter(name).detach()
    edit(tmp_path, **{key: weight.T.contiguous()})
    with pytest.raises(ValueError, match=rf"tensor '{name}': expected shape \(128, 64\), got \(64, 128\)"):
        load(tmp_path)
    edit(tmp_path, **{key: None})
    with pytest.raises(ValueError, match=f"missing tensor '{name}'"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"missing tensor '{name}'"):
        load(tmp_path, quantize=QUANTIZE)
    foreign = {"v_head__weight": weight[:1].clone(), "model__layers__2__mlp__up_proj__weight": weight.clone()}
    edit(tmp_path, **{key: weight, **foreign})
    with pytest.warns(
        UserWarning, match=r"2 tensors .* LlamaForCausalLM is without are left out, as 'model\.layers\.2\."
    ):
        load(tmp_path)
    edit(tmp_path, **dict.fromkeys(foreign), model__extra=weight[:1].clone())
    with pytest.raises(ValueError, match=r"unknown tensor 'model\.extra' for LlamaForCausalLM"):
        load(tmp_path)


def test_nan_in_a_weight_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = save_tiny_model(tmp_path).get_parameter(name).detach().clone()
    weight[3, 5] = float("nan")
    edit(tmp_path, **{name.replace(".", "__"): weight})
    with pytest.raises(ValueError, match=f"tensor '{name}': .*NaN"):
        load(tmp_path, quantize=QUANTIZE)


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_safetensors(tmp_path: Path, damage: str) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if damage == "truncated" else b"PK\x03\x04" * 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_model_in_layers_of_another_kind(tmp_path: Path, method: str) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"expected the original model, got one quantized by {method}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "llama", "vocab_size": "258"}'),
        ("config.json", '{"model_type": "llama",'),
        ("tokenizer.json", '{"version": "1.0",'),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "\xff"),
        ("generation_config.json", "[]"),
        ("generation_config.json", "[" * 100_000),
    ],
    ids=["config-type", "config-half", "tokenizer-half", "tokenizer-parts", "tokenizer-config", "list", "nested"],
)
def test_a_damaged_file_of_transformers_is_told_with_its_folder(tmp_path: Path, name: str, content: str) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    what = name.removesuffix(".json") if name.startswith("generation") else name.partition("_")[0].removesuffix(".json")
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a {what} that transformers can read, got: "):
        getattr(checkpoint, what)()


BAD_INDICES = ("[]", "{}", "{", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": 1}}')


def test_what_is_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a model folder with config\.json"):
        open_checkpoint(str(tmp_path))
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected model\.safetensors \(pickled checkpoints are not read\)"):
        open_checkpoint(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    elsewhere = f"../{tmp_path.name}/pytorch_model.bin"
    for content, message in [
        *((bad, "expected a safetensors index with a weight_map") for bad in BAD_INDICES),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), r"expected the file 'gone\.safetensors' beside it"),
        (json.dumps({"weight_map": {"a": elsewhere}}), f"expected the file '{elsewhere}' beside it"),
    ]:
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            open_checkpoint(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        open_checkpoint(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"expected a model folder or a \.gguf file"):
        open_checkpoint(str(index))


def test_hub_name_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_tiny_model(tmp_path)
    fetched: dict[str, Any] = {}

    def snapshot(name: str, **patterns: list[str]) -> str:
        fetched.update(name=name, **patterns)
        return str(tmp_path)

    monkeypatch.setattr("qlora_ext.finetune.load.snapshot_download", snapshot)
    assert_same_model(load(Path("someone/tiny")), saved)
    assert fetched["name"] == "someone/tiny"
    files = ["model-00001-of-00002.safetensors", "tokenizer.model", "pytorch_model.bin", "original/model.safetensors"]
    fetched_files = filter_repo_objects(
        files, allow_patterns=fetched["allow_patterns"], ignore_patterns=fetched["ignore_patterns"]
    )
    assert list(fetched_files) == files[:2]

    def offline(*_: object, **__: object) -> str:
        raise OSError("no route to host\nmore lines")

    monkeypatch.setattr("qlora_ext.finetune.load.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"not fetched from the hub \(no route to host\)"):
        load(Path("someone/tiny"))


def test_auto_dtype_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlora_ext._C, "cpu_paths", lambda: ["portable", "avx2", "avx512", "avx512_bf16"])
    assert compute_dtype("auto", CPU) == torch.bfloat16
    assert compute_dtype("fp32", CPU) == torch.float32
    monkeypatch.setattr(qlora_ext._C, "cpu_paths", lambda: ["portable", "avx2"])
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("bf16", CPU) == torch.bfloat16
