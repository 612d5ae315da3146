"""Merging a model that has shapes alone: on meta, or under FakeTensorMode."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from random_layers import BASES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_ext import LoraConfig, add_adapter, merge_adapter, quantize_model, unmerge_adapter


@pytest.mark.parametrize("dequantize", [False, True], ids=["", "dequantize"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("without_values", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_a_merge_without_values(
    without_values: type[AbstractContextManager[object]], base: str, dequantize: bool
) -> None:
    with without_values():
        model: nn.Module = nn.Sequential(nn.Linear(64, 48))
        if base == "Linear4bit":
            quantize_model(model)
        add_adapter(model, LoraConfig(r=2))
        merge_adapter(model, dequantize=dequantize)
        assert model(torch.ones(3, 64)).shape == (3, 48)
        if not dequantize:
            unmerge_adapter(model)
        assert model(torch.ones(3, 64)).shape == (3, 48)
