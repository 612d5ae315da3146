"""LoraConfig: what it refuses, and which rank and scaling it gives to which layer."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
from torch import nn

from qlora_ext import LoraConfig

BAD = {
    "r-zero": ({"r": 0}, ValueError, "r: .*at least 1.*0"),
    "r-negative": ({"r": -1}, ValueError, "r: .*-1"),
    "r-float": ({"r": 8.0}, ValueError, "r: .*8.0"),
    "r-bool": ({"r": True}, ValueError, "r: .*True"),
    "r-str": ({"r": "8"}, ValueError, "r: .*'8'"),
    "rank-pattern-value": ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern.*0"),
    "rank-pattern-type": ({"rank_pattern": ["q"]}, TypeError, "rank_pattern.*'q'"),
    "rank-pattern-regex": ({"rank_pattern": {"q(": 4}}, ValueError, r"rank_pattern.*'q\('"),
    "rank-pattern-key": ({"rank_pattern": {5: 8}}, TypeError, "rank_pattern.*5"),
    "rank-pattern-flag": ({"rank_pattern": {"(?i)q": 4}}, ValueError, r"rank_pattern.*'\(\?i\)q'"),
    "alpha-pattern-flag": ({"alpha_pattern": {"(?i)q": 4}}, ValueError, r"alpha_pattern.*'\(\?i\)q'"),
    "targets-repeat": ({"target_modules": "q{99999999999}"}, ValueError, "target_modules.*'q{9*}'"),
    "alpha-above-floats": ({"lora_alpha": 10**400}, ValueError, "lora_alpha.*finite.*10*"),
    "alpha-bool": ({"lora_alpha": True}, ValueError, "lora_alpha.*True"),
    "alpha-nan": ({"lora_alpha": math.nan}, ValueError, "lora_alpha.*nan"),
    "alpha-inf": ({"lora_alpha": math.inf}, ValueError, "lora_alpha.*inf"),
    "alpha-str": ({"lora_alpha": "16"}, ValueError, "lora_alpha.*'16'"),
    "alpha-pattern-value": ({"alpha_pattern": {"q": math.nan}}, ValueError, "alpha_pattern.*nan"),
    "alpha-pattern-type": ({"alpha_pattern": 3}, TypeError, "alpha_pattern.*3"),
    "alpha-pattern-regex": ({"alpha_pattern": {"[": 4}}, ValueError, r"alpha_pattern.*'\['"),
    "dropout-negative": ({"lora_dropout": -0.1}, ValueError, "lora_dropout.*-0.1"),
    "dropout-one": ({"lora_dropout": 1.0}, ValueError, "lora_dropout.*1.0"),
    "dropout-nan": ({"lora_dropout": math.nan}, ValueError, "lora_dropout.*nan"),
    "dropout-bool": ({"lora_dropout": False}, ValueError, "lora_dropout.*False"),
    "dropout-str": ({"lora_dropout": "0.1"}, ValueError, "lora_dropout.*'0.1'"),
    "targets-number": ({"target_modules": 3}, TypeError, "target_modules.*3"),
    "targets-numbers": ({"target_modules": ["q", 1]}, TypeError, "target_modules.*1"),
    "targets-none": ({"target_modules": None}, TypeError, "target_modules.*None"),
    "targets-empty-list": ({"target_modules": []}, ValueError, r"target_modules.*\[\]"),
    "targets-empty-str": ({"target_modules": ""}, ValueError, "target_modules.*''"),
    "targets-regex": ({"target_modules": "q("}, ValueError, r"target_modules.*'q\('"),
    "rslora-str": ({"use_rslora": "no"}, TypeError, "use_rslora.*'no'"),
}


@pytest.mark.parametrize(("fields", "error", "message"), BAD.values(), ids=BAD)
def test_config_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^LoraConfig: {message}"):
        LoraConfig(**fields)


class Names(nn.Module):
    """Linear layers whose names share last parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 8)}) for _ in range(11))
        self.q = nn.Linear(8, 8)


PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "last-part": {"rank_pattern": {"q": 4}, "alpha_pattern": {"up": 5}},
    "some-parts": {"rank_pattern": {"1.q": 4}, "alpha_pattern": {"layers.1.up": 5}},
    "regex": {"rank_pattern": {r"layers\.[02]\.q": 4, r"layers\.\d+\..*": 2}, "alpha_pattern": {"q|up": 3}},
    "anchored": {"rank_pattern": {"^q": 4, "^up": 2}, "alpha_pattern": {"^layers.1.q": 3}},
    "first-wins": {"rank_pattern": {"q": 4, "layers.0.q": 2}, "alpha_pattern": {"layers.0.q": 1, "q": 32}},
    "no-match": {"rank_pattern": {"k": 4}, "alpha_pattern": {"ers.0.q": 32}},
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"up": 3}, "alpha_pattern": {"1.up": 7}},
}


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS)
def test_rank_and_scaling_of_each_layer_as_peft_resolves_them(fields: dict[str, Any]) -> None:
    targets = ["q", "up"]
    model = peft.get_peft_model(Names(), peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, **fields))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, **fields)
    layers = [(n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == 23
    for name, layer in layers:
        assert config.rank(name) == layer.r["default"], name
        assert config.scaling(name) == layer.scaling["default"], name
