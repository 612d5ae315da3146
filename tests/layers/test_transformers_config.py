"""What transformers' models ask their config about quantized layers."""

from __future__ import annotations

import pytest
import torch
from random_layers import names_of, randomize_adapters
from tiny_model import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, JambaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype

from qlora_ext import Linear4bit, LoraConfig, LoraLinear, add_adapter, merge_adapter, quantize_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_flash_attention_learns_its_dtype_from_the_config(dtype: torch.dtype | None) -> None:
    """In place of the first nn.Linear's: of a layer of attention in 4 bits there is none."""
    model = LlamaForCausalLM(tiny_config(dtype=dtype)).bfloat16()
    attention = nn.Sequential(quantize_model(model)).get_submodule("0.model.layers.0.self_attn")
    assert not names_of(attention, nn.Linear)
    assert get_target_dtype(torch.ones(1), attention) is torch.bfloat16
    assert "_is_quantized" not in model.config.to_dict()


def test_only_models_of_transformers_have_such_a_config() -> None:
    class Diffuser(nn.Sequential):
        config = {"_is_quantized": None}  # noqa: RUF012
        _keep_in_fp32_modules = None

    class WithoutParameters(PreTrainedModel):
        pass

    model = Diffuser(*(LlamaForCausalLM(tiny_config()) for _ in range(2)), nn.Linear(64, 64))
    model[1].config = None
    model.append(WithoutParameters(tiny_config(dtype=None)))
    quantize_model(model)
    assert model.config == {"_is_quantized": None}
    assert model[0].config._is_quantized
    assert model[1].config is None


def test_jamba_calls_dt_proj_where_it_is_in_4_bits() -> None:
    torch.manual_seed(0)
    config = JambaConfig(
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "num_experts": 1, "vocab_size": 64, "mamba_dt_rank": 64, "mamba_d_state": 8},
        **{"attn_layer_period": 2, "attn_layer_offset": 1},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    quantize_model(model)
    add_adapter(model, LoraConfig(r=2))
    randomize_adapters(model)
    assert isinstance(model.get_submodule("model.layers.0.mamba.dt_proj"), LoraLinear)
    assert names_of(model, Linear4bit)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        merge_adapter(model, dequantize=True)
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)
