"""quantize_model: which layers it replaces, by what, and what it leaves alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from random_layers import TwoPlaces, WithAttention, names_of, randomize_adapters, state_bytes
from reference import assert_same
from tiny_model import tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from qlora_ext import (
    Linear4bit,
    LoraConfig,
    LoraLinear,
    add_adapter,
    merge_adapter,
    quantize_model,
)
from qlora_ext.model_layers import linear_layers


def test_each_linear_but_the_head_is_replaced_by_its_4bit_twin() -> None:
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval()
    linears = {name: model.get_submodule(name) for name in names_of(model, nn.Linear)}
    assert quantize_model(model, quant_type="fp4", blocksize=32, double_quant=False) is model
    assert names_of(model, Linear4bit) == set(linears) - {"lm_head"}
    assert names_of(model, nn.Linear) == {"lm_head"}
    for name in names_of(model, Linear4bit):
        twin = Linear4bit.from_linear(linears[name], quant_type="fp4", blocksize=32, double_quant=False)
        layer = model.get_submodule(name)
        assert repr(layer) == repr(twin)
        assert state_bytes(layer) == state_bytes(twin)
        assert not layer.training


def test_the_model_computes_with_the_decoded_weights() -> None:
    model = LlamaForCausalLM(tiny_config()).eval()
    plain = copy.deepcopy(model)
    quantize_model(model)
    for name in names_of(model, Linear4bit):
        plain.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)


def test_weights_in_other_tensors_of_3_dimensions_are_named() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(64, 64), "experts": nn.Module()})
    model.experts.weight = nn.Parameter(torch.randn(4, 64, 64))
    with pytest.warns(
        UserWarning, match=r"16,384 weights stay as they are, .* \(as experts\.weight\); .* 4,096"
    ) as told:
        quantize_model(model)
    assert told[0].filename == __file__
    assert model.experts.weight.dtype == torch.float32


def test_convolutions_are_no_experts(recwarn: pytest.WarningsRecorder) -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(64, 64, 3))
    quantize_model(nn.Sequential(nn.Conv1d(64, 64, 3), nn.ConvTranspose1d(64, 64, 3), normed, nn.Linear(64, 64)))
    assert not recwarn.list


def test_tied_weights_are_left_alone() -> None:
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    quantize_model(model, skip=())
    assert names_of(model, nn.Linear) == {"lm_head"}
    assert model.lm_head.weight is model.model.embed_tokens.weight

    twins = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    twins[2].weight = twins[0].weight
    quantize_model(twins)
    assert names_of(twins, nn.Linear) == {"0", "2"}
    assert twins[2].weight is twins[0].weight


def test_a_layer_in_several_places_is_replaced_in_all_by_one() -> None:
    model = quantize_model(TwoPlaces())
    assert isinstance(model.first["a"], Linear4bit)
    assert model.first["b"] is model.first["a"]
    assert model.second["c"] is model.first["a"]


def test_multihead_attention_is_left_alone() -> None:
    model = WithAttention()
    before = state_bytes(model.attention)
    with pytest.warns(UserWarning, match="layers within MultiheadAttention stay as they are"):
        quantize_model(model)
    assert names_of(model, Linear4bit) == {"proj"}
    assert state_bytes(model.attention) == before
    for training in (True, False):
        assert model.train(training)(torch.randn(2, 3, 64)).isfinite().all()


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_subclass_of_linear_is_left_alone() -> None:
    model = quantize_model(nn.Sequential(Doubled(64, 64), nn.Linear(64, 64)))
    assert names_of(model, Doubled) == {"0"}
    assert names_of(model, Linear4bit) == {"1"}


@pytest.mark.parametrize("training", [True, False])
def test_torchs_transformer_layer_still_runs(training: bool) -> None:
    """In eval mode without gradients it hands the weights of its linear layers to a fused kernel."""
    encoder = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    kinds = "MultiheadAttention, TransformerEncoderLayer"
    with pytest.warns(UserWarning, match=f"quantize_model: model: layers within {kinds} stay as they are") as told:
        model = quantize_model(nn.Sequential(encoder, nn.Linear(64, 8)))
    assert told[0].filename == __file__
    x = torch.randn(2, 3, 64)
    expected = model(x)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model.train(training)(x), expected)


def test_nothing_is_left_to_quantize() -> None:
    alone = nn.ModuleList([nn.TransformerEncoderLayer(64, 4, 128)])
    with pytest.raises(ValueError, match=r"got only layers within MultiheadAttention, TransformerEncoderLayer$"):
        quantize_model(alone)
    with pytest.raises(ValueError, match=r"\(.*: none\), not within MultiheadAttention, Trans.*, got \['linear1'\]"):
        add_adapter(alone, LoraConfig(target_modules=["linear1"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is in skip needs no word
        quantize_model(nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128), nn.Linear(64, 64)), skip=["0"])
    expected = r"in skip=\('lm_head', 'score', 'classifier', 'qa_outputs'\), got only layers in 4 bits$"
    with pytest.raises(ValueError, match=expected):
        quantize_model(quantize_model(nn.Sequential(nn.Linear(64, 8))))


def test_on_meta() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    quantize_model(model)
    assert len(names_of(model, Linear4bit)) == 14
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def with_bad_weight(value: float, **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ModuleDict({"proj": nn.Linear(64, 8, **options)}))
    nn.init.constant_(model[1]["proj"].weight[3, 5], value)
    return model


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"quantize_model.*1\.proj.*weight.*finite"):
        quantize_model(with_bad_weight(bad))


def test_a_weight_of_another_dtype_is_named() -> None:
    with pytest.raises(TypeError, match=r"quantize_model.*1\.proj.*weight.*Double"):
        quantize_model(with_bad_weight(0.0, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"quant_type": "int4"}, {"blocksize": 63}], ids=str)
def test_wrong_options_change_nothing(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(ValueError, match=rf"{next(iter(options))}.*{next(iter(options.values()))}"):
        quantize_model(model, **options)
    assert names_of(model, nn.Linear) == {"0"}


def test_a_model_without_a_linear_layer_is_refused() -> None:
    for model in (nn.Sequential(nn.ReLU()), quantize_model(nn.Sequential(nn.Linear(64, 8)))):
        with pytest.raises(ValueError, match=r"quantize_model.*model.*nn\.Linear"):
            quantize_model(model)


def test_only_torch_compiles_module_is_one_in_between() -> None:
    """Another may have a child of the name that it gives."""
    model = nn.ModuleDict({"head": nn.Linear(64, 64), "_orig_mod": nn.Linear(64, 64)})
    assert linear_layers(quantize_model(nn.Sequential(model))).keys() == {"0.head", "0._orig_mod"}


def test_the_input_gradient_flows_through_all_layers() -> None:
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    expected = torch.ones(3, 64) @ model[1].dequantize() @ model[0].dequantize()
    torch.testing.assert_close(x.grad, expected)
    assert_same(model[1].bias.grad, torch.full((64,), 3.0))


# --- adapters that are there already --------------------------------------------------------------------------------


def adapted(*, quantized_first: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    if quantized_first:
        quantize_model(model, skip="2")
    add_adapter(model, LoraConfig(r=2, target_modules=["0", "2"]))
    randomize_adapters(model)
    return model


def test_layers_with_adapters_are_quantized_below_them() -> None:
    model, expected = adapted(quantized_first=False), adapted(quantized_first=True)
    adapters = [p for p in model.parameters() if p.requires_grad]
    model[0].base_layer.bias.requires_grad_(True)
    model[0].eval()
    quantize_model(model, skip="2")
    assert [type(layer) for layer in model] == [LoraLinear, Linear4bit, LoraLinear]
    assert [type(model[i].base_layer) for i in (0, 2)] == [Linear4bit, nn.Linear]
    assert state_bytes(model) == state_bytes(expected)
    assert [p for p in model.parameters() if p.requires_grad] == [model[0].base_layer.bias, *adapters]
    assert not model[0].base_layer.training
    x = torch.randn(3, 64)
    assert_same(model(x), expected(x))


def test_a_model_whose_layers_all_have_adapters_is_quantized() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    add_adapter(model, LoraConfig(r=2))
    assert isinstance(quantize_model(model)[0].base_layer, Linear4bit)
    with pytest.raises(ValueError, match=r"expected an nn\.Linear in it.*got only layers in 4 bits$"):
        quantize_model(model)


def test_merged_adapters_are_refused() -> None:
    model = adapted(quantized_first=False)
    merge_adapter(model)
    with pytest.raises(ValueError, match="quantize_model: model: expected unmerged adapters"):
        quantize_model(model)
    assert names_of(model, Linear4bit) == set()


def test_a_model_in_pefts_hands_is_refused() -> None:
    model = LlamaForCausalLM(tiny_config())
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for config in (prompt, peft.LoraConfig(target_modules=["q_proj"])):
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        with pytest.raises(ValueError, match=r"quantize_model: model: .* before PEFT wraps it"):
            quantize_model(wrapped)
        assert names_of(wrapped, Linear4bit) == set()
    assert len(names_of(quantize_model(wrapped.unload()), Linear4bit)) == 14


# --- what is no model -----------------------------------------------------------------------------------------------


def test_the_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"quantize_model: model: expected an nn\.Module, got str"):
        quantize_model("x")  # type: ignore[type-var]


def test_a_single_layer_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"quantize_model: model: .*Linear4bit\.from_linear.*got Linear itself"):
        quantize_model(nn.Linear(64, 8))


def test_a_place_may_have_no_module() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model.register_module("none", None)
    add_adapter(quantize_model(model), LoraConfig())
    assert model[0](torch.ones(1, 64)).shape == (1, 64)


def test_three_dimensions_alone_make_no_experts(recwarn: pytest.WarningsRecorder) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed, self.config = False, None
            self.layer = nn.Linear(64, 64)
            self.weight = nn.Parameter(torch.randn(2, 64, 8))
            self.codes = nn.Parameter(torch.zeros(2, 64, 64, dtype=torch.uint8), requires_grad=False)

    model = quantize_model(nn.Sequential(Other()))
    assert isinstance(model[0].weight, nn.Parameter)
    assert not recwarn


@pytest.mark.filterwarnings("ignore:quantize_model. model. layers within")
@pytest.mark.parametrize("first", ["the block", "its layer"])
def test_what_stands_within_attention_and_beside_it_is_left(first: str) -> None:
    """Torch hands its weight to kernels of its own, wherever else the layer stands."""
    block = nn.TransformerEncoderLayer(64, 2, 64)
    both = [block, block.linear1] if first == "the block" else [block.linear1, block]
    model = nn.Sequential(*both, nn.Linear(64, 64))
    add_adapter(quantize_model(model), LoraConfig(r=2))
    assert list(model)[:2] == both
    assert type(block.linear1) is nn.Linear
    assert isinstance(model[2], LoraLinear)
