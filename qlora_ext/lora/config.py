"""LoraConfig: what an adapter looks like and where it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from qlora_ext.lora.names import LAST_PARTS, by_pattern, check_regex


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter looks like and where it goes. Names and meanings are PEFT's.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r. (The default is 16, PEFT's is 8.)
        lora_dropout: probability, in training, that an element of A's input is dropped.
        target_modules: names (whole, or last parts) of linear layers; or one regular expression that a whole name must
            match; or "all-linear": every linear layer, bitsandbytes' too, but the heads, what is tied to them, and
            other subclasses of nn.Linear with a forward of their own, which may compute anything. None within
            nn.MultiheadAttention or nn.TransformerEncoderLayer.
        use_rslora: scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732).
        rank_pattern, alpha_pattern: other r or lora_alpha for some layers: {name, or regular expression for its last
            dotted parts: value}.
        target_parameters: names (whole, or last parts) of weights of fused experts in 4 bits, as "experts.down_proj":
            each expert gets its own A and B, without dropout. With it target_modules may be [].

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, by name.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for what in ("rank_pattern", "alpha_pattern"):
            if not isinstance(pattern := getattr(self, what), dict):
                raise TypeError(f"LoraConfig: {what}: expected a dict, got {pattern!r}")
            for key in pattern:
                check_regex(f"LoraConfig: {what}", key, LAST_PARTS)
        if isinstance(self.target_modules, str):
            check_regex("LoraConfig: target_modules", self.target_modules)
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"LoraConfig: use_rslora: expected a bool, got {self.use_rslora!r}")
        for what, r in [("r", self.r), *(("rank_pattern", r) for r in self.rank_pattern.values())]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"LoraConfig: {what}: expected an integer of at least 1, got {r!r}")
        for what, alpha in [
            ("lora_alpha", self.lora_alpha),
            *(("alpha_pattern", a) for a in self.alpha_pattern.values()),
        ]:
            if not _is_number(alpha) or not abs(alpha) <= torch.finfo(torch.float64).max:
                raise ValueError(f"LoraConfig: {what}: expected a finite number, got {alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoraConfig: lora_dropout: expected a probability in [0, 1), got {self.lora_dropout!r}")
        names, parameters = self.target_modules, self.target_parameters
        if not isinstance(names, str) and not _are_names(names):
            raise TypeError(f"LoraConfig: target_modules: expected a str or a list of str, got {names!r}")
        if not _are_names(parameters):
            raise TypeError(f"LoraConfig: target_parameters: expected a list of str, got {parameters!r}")
        if not names and not parameters:
            raise ValueError(f"LoraConfig: target_modules: expected at least one name, got {names!r}")
        if parameters and self.lora_dropout:
            expected = "0 with target_parameters (as in PEFT)"
            raise ValueError(f"LoraConfig: lora_dropout: expected {expected}, got {self.lora_dropout!r}")

    def rank(self, module_name: str) -> int:
        """r of the layer of this name."""
        return by_pattern(self.rank_pattern, module_name, self.r)

    def scaling(self, module_name: str) -> float:
        """The factor of B A in the layer of this name."""
        r = self.rank(module_name)
        return by_pattern(self.alpha_pattern, module_name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
