"""Models of transformers that are loaded with BitsAndBytesConfig: adapters on them, and why they are not quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from random_layers import randomize_adapters
from reference import assert_same
from tiny_model import one_thread as one_thread
from tiny_model import save_tiny_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from qlora_ext import Linear4bit, LoraConfig, LoraLinear, add_adapter, load_adapter, quantize_model, save_adapter

BITS = {"4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8": {"load_in_8bit": True}}
by_bits = pytest.mark.parametrize("bits", BITS)
IDS = torch.arange(2, 12)[None]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which transformers keeps `wo` in float32, beside layers of bitsandbytes'."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def loaded(folder: Path, bits: str, kind: type[Any] = T5ForConditionalGeneration) -> Any:
    how = BitsAndBytesConfig(**BITS[bits])  # type: ignore[arg-type]
    return kind.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, decoder_input_ids=IDS).logits  # type: ignore[no-any-return]


@by_bits
def test_all_linear_takes_the_layers_that_it_takes_in_peft(t5: Path, bits: str, tmp_path: Path) -> None:
    model = loaded(t5, bits)
    add_adapter(model, LoraConfig(r=2))
    ours = {name for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    theirs = peft.get_peft_model(loaded(t5, bits), peft.LoraConfig(r=2, target_modules="all-linear")).base_model.model
    assert ours == {n for n, layer in theirs.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    assert {name.rsplit(".", 1)[-1] for name in ours} == {"q", "k", "v", "o", "wi", "wo"}

    randomize_adapters(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(ours)
    assert all(p.grad is not None and p.grad.any() for p in trained)
    save_adapter(model, tmp_path)
    again = loaded(t5, bits)
    load_adapter(again, tmp_path)
    assert_same(logits(again), logits(model))
    assert_same(logits(peft.PeftModel.from_pretrained(loaded(t5, bits), str(tmp_path))), logits(model))


@by_bits
def test_all_linear_takes_them_where_no_layer_is_dense(bits: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    model = loaded(tmp_path, bits, LlamaForCausalLM)
    add_adapter(model, LoraConfig(r=2))
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 14


@by_bits
def test_what_is_in_their_bits_is_to_be_loaded_without(bits: str, tmp_path: Path) -> None:
    """And not to be made an nn.Linear of, which would multiply by the bytes."""
    save_tiny_model(tmp_path)
    name = {"4": "Linear4bit", "8": "Linear8bitLt"}[bits]
    got = rf"got only subclasses of it \(bitsandbytes\.nn\.modules\.{name}\)"
    advice = r" \(the weights of some are no floats: load the model without quantization_config\)$"
    with pytest.raises(ValueError, match=r"^quantize_model: model: expected an nn.Linear in it .*" + got + advice):
        quantize_model(loaded(tmp_path, bits, LlamaForCausalLM))


def test_each_gets_the_advice_that_fits_it() -> None:
    class Other(nn.Linear):
        pass

    def model(*beside: nn.Module) -> nn.Sequential:
        return nn.Sequential(bitsandbytes.nn.Linear4bit(64, 128, quant_type="nf4").to("cpu"), *beside)

    kinds = r"\(Other, bitsandbytes\.nn\.modules\.Linear4bit\)"
    with pytest.raises(ValueError, match=kinds + r" \(one that .* = nn.Linear; the weights of some .*_config\)$"):
        quantize_model(model(Other(64, 64)))
    message = (
        r"8,192 weights stay .*, in subclasses of nn.Linear \(bitsandbytes\.nn\.modules\.Linear4bit; the weights of "
        r"some are no floats: load the model without quantization_config\); in 4 bits are 4,096$"
    )
    with pytest.warns(UserWarning, match=message):
        mixed = quantize_model(model(nn.Linear(64, 64)))
    assert [type(layer) for layer in mixed] == [bitsandbytes.nn.Linear4bit, Linear4bit]
