"""What transformers' models ask their config about quantized layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_layers import names_of, randomize_adapters
from reference import assert_same
from tiny_model import tiny_config
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    JambaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.flash_attention import get_target_dtype

from qlora_ext import (
    Linear4bit,
    LoraConfig,
    LoraLinear,
    add_adapter,
    merge_adapter,
    quantize_model,
    unmerge_adapter,
)


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


def jamba() -> PreTrainedConfig:
    """Which multiplies by the weight of dt_proj where it is dense, and else calls dt_proj, and takes the bias off."""
    return JambaConfig(
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "num_experts": 1, "vocab_size": 64, "mamba_dt_rank": 64, "mamba_d_state": 8},
        **{"attn_layer_period": 2, "attn_layer_offset": 1},
    )


def falcon_mamba() -> PreTrainedConfig:
    """Likewise."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    return FalconMambaConfig(**sizes, state_size=8, time_step_rank=64)


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(model: Any) -> Any:
    add_adapter(quantize_model(model), LoraConfig(r=2))
    randomize_adapters(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6), use_cache=False).logits  # type: ignore[no-any-return]


def test_jamba_calls_dt_proj_where_it_is_in_4_bits() -> None:
    model = adapted(model_of(jamba()))
    assert isinstance(model.get_submodule("model.layers.0.mamba.dt_proj"), LoraLinear)
    assert names_of(model, Linear4bit)
    before = logits(model)
    merge_adapter(model, dequantize=True)
    torch.testing.assert_close(before, logits(model))


@pytest.mark.parametrize("config", [jamba, falcon_mamba])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_merged_model_computes_as_one_that_was_always_dense(
    config: Callable[[], PreTrainedConfig], copied: Callable[[Any], Any]
) -> None:
    """In bfloat16 a bias that is put on and taken off again shows."""
    model = model_of(config()).bfloat16()
    model = copied(adapted(model))
    merge_adapter(model)
    unmerge_adapter(model)
    assert model.config._is_quantized
    assert model.config.dtype is torch.bfloat16
    merge_adapter(model, dequantize=True)
    assert not hasattr(model.config, "_is_quantized")
    dense = model_of(config()).bfloat16()
    dense.load_state_dict(model.state_dict())
    assert_same(logits(model), logits(dense))


def test_a_model_in_4_bits_is_one_though_another_of_its_config_is_merged() -> None:
    config = jamba()
    one, two = (adapted(model_of(config)) for _ in range(2))
    assert one.config is two.config
    before = logits(two)
    merge_adapter(one, dequantize=True)
    assert_same(logits(two), before)
    quantize_model(one)
    merge_adapter(two, dequantize=True)
    assert config._is_quantized
    merge_adapter(one, dequantize=True)
    assert not hasattr(config, "_is_quantized")


def test_a_model_quantized_part_by_part_is_unmarked_when_it_is_merged() -> None:
    model = quantize_model(model_of(jamba()), skip=["lm_head", "layers.0"])
    quantize_model(model.model)
    merge_adapter(model.model.layers[1], dequantize=True)
    assert model.config._is_quantized
    merge_adapter(model, dequantize=True)
    assert not hasattr(model.config, "_is_quantized")
    assert model.config is model.model.config, "a setting of one is the other's"


def test_a_config_that_was_exchanged_is_left_as_it_is() -> None:
    model = adapted(model_of(jamba()))
    model.config = jamba()
    merge_adapter(model, dequantize=True)
    assert not hasattr(model.config, "_is_quantized")


def test_the_mark_of_another_quantizer_stays() -> None:
    model = model_of(jamba())
    model.config._is_quantized = True
    merge_adapter(adapted(model), dequantize=True)
    assert model.config._is_quantized is True
