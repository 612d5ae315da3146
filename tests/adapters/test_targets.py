"""What a config's targets mean does not depend on the adapters that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_ext import LoraConfig, LoraLinear, add_adapter, quantize_model
from qlora_ext.adapters.peft_config import read_config
from qlora_ext.dense_linear import is_dense_linear
from qlora_ext.model_layers import output_head


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).softmax(-1)


class Model(nn.Module):
    """A layer, a router, and a head with what is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate, self.tied, self.lm_head = (
            kind(64, 64) for kind in (nn.Linear, Router, *2 * [nn.Linear])
        )
        self.tied.weight = self.lm_head.weight


class ModelOfTransformers(Model):
    """Which says what its head is, by whatever name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_out = self.lm_head
        del self.lm_head

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_out


class ModelOfTwoNames(Model):
    """Whose head has another name first."""

    def __init__(self) -> None:
        super().__init__()
        head = self.lm_head
        del self.lm_head
        self.decoder_out = head
        self.lm_head = head


MODELS = (Model, ModelOfTransformers, ModelOfTwoNames)


@pytest.mark.parametrize("before", ["layer", "gate", "tied", ".*(head|out)"])
@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_means_the_same_layers_beside_another_adapter(kind: type[Model], before: str) -> None:
    model = kind()
    add_adapter(model, LoraConfig(target_modules=before), "before")
    add_adapter(model, LoraConfig(), "all")
    found = {name for name, layer in model.named_modules() if isinstance(layer, LoraLinear) and "all" in layer.configs}
    assert found == {"layer"}


def test_a_head_that_holds_its_backbone_is_one_without_it() -> None:
    class Head(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.out = body, nn.Linear(64, 8)

    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(64, 64))
    model.classifier = Head(model.body)
    assert output_head(model) == {"classifier.out"}


def test_parametrized_layers_are_no_heads_for_another_that_is() -> None:
    model = Model()
    for layer in (model.layer, model.lm_head):
        nn.utils.parametrizations.weight_norm(layer)
    assert output_head(model) == {"lm_head"}


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_with_an_adapter_stays_dense(kind: type[Model]) -> None:
    model = kind()
    add_adapter(model, LoraConfig(target_modules=".*(head|out)"))
    quantize_model(model)
    assert [type(m) for m in model.modules() if is_dense_linear(m)] == [Router, nn.Linear, nn.Linear]
    assert torch.equal(
        model.tied.weight, next(m.base_layer.weight for m in model.modules() if isinstance(m, LoraLinear))
    )


@pytest.mark.parametrize(
    ("fields", "demanded"),
    [
        ({"layers_to_transform": [1]}, ["m.layers.1.proj"]),
        # In PEFT's regular expression this is "layers" with no number, or "x" with one.
        ({"layers_to_transform": [1], "layers_pattern": "layers|x"}, []),
        ({"exclude_modules": "m|head.*"}, ["m.layers.1.proj", "m.layers.0.proj"]),
        ({"modules_to_save": ["head"]}, ["m.layers.1.proj", "m.layers.0.proj"]),
    ],
    ids=str,
)
def test_of_which_layers_a_file_must_have_tensors(fields: dict[str, Any], demanded: list[str], tmp_path: Path) -> None:
    fields = {"peft_type": "LORA", "target_modules": ["proj"]} | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    demands = read_config(tmp_path)[2]
    assert [name for name in ("head.proj", "m.layers.1.proj", "m.layers.0.proj") if demands(name)] == demanded
