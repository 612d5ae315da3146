"""PEFT's adapter_config.json: what is written, what of it is read, and what of it is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from qlora_ext.layer_names import is_named, unwrapped
from qlora_ext.lora.config import LoraConfig
from qlora_ext.lora.names import check_regex

CONFIG_FILE = "adapter_config.json"

_PEFTS_DEFAULTS = {"r": 8, "lora_alpha": 8}
# Fields of PEFT's config that would change what the adapter computes, and the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base's own weight
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# PEFT's words for what a model of transformers does, by the end of its class's name; and the heads that PEFT then takes
# to be in modules_to_save.
_TASK_TYPES: dict[str, tuple[str, set[str]]] = {
    "ForCausalLM": ("CAUSAL_LM", set()),
    "ForSequenceClassification": ("SEQ_CLS", {"classifier", "score"}),
    "ForTokenClassification": ("TOKEN_CLS", {"classifier", "score"}),
    "ForQuestionAnswering": ("QUESTION_ANS", {"qa_outputs"}),
}
# What PEFT puts a name from modules_to_save, and one from layers_pattern, into.
_SAVED_WHOLE = r"(^|.*\.){}($|\..*)"
_BLOCK = r"(?:.*?\.)?{}\.(?P<index>\d+)\."


def describe(
    model: nn.Module, config: LoraConfig, modules_to_save: list[str], *, tied: bool, conv1d: bool
) -> dict[str, Any]:
    """The file's content, for an adapter that is on what the config targets."""
    plain = unwrapped(model)
    model_config = getattr(plain, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(plain, modules_to_save),
        "base_model_name_or_path": getattr(model_config, "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": modules_to_save or None,
        **({"ensure_weight_tying": True} if tied else {}),
        **({"fan_in_fan_out": True} if conv1d else {}),  # PEFT goes by the layer, but warns without this
        **asdict(config),
        "target_parameters": config.target_parameters or None,
    }


def _task_type(model: nn.Module, modules_to_save: list[str]) -> str | None:
    """By which PEFT's AutoPeftModel finds the model's class; None where PEFT would demand what is not in the file."""
    kind = type(model).__name__
    if kind.endswith("ForConditionalGeneration"):
        takes_ids = getattr(model, "main_input_name", None) == "input_ids"  # not Whisper, to which PEFT would give some
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if takes_ids and encodes else None
    for end, (task_type, heads) in _TASK_TYPES.items():
        if kind.endswith(end) and heads & model._modules.keys() <= set(modules_to_save):
            return task_type
    return None


def read_config(folder: Path) -> tuple[LoraConfig, list[str], Callable[[str], bool]]:
    """The config, modules_to_save, and whether tensors of a layer of this name are demanded if its targets match it."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        expected = f"a folder with {CONFIG_FILE} (what is on a hub is to be downloaded first)"
        raise FileNotFoundError(f"load_adapter: folder: expected {expected}, got {str(folder)!r}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; nested too deep
        raise ValueError(f"load_adapter: {path}: expected JSON, got an error at reading: {error}") from error
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        got = given.get("peft_type") if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"load_adapter: {path}: peft_type: expected 'LORA', got {got!r}")
    for key, neutral in _NEUTRAL.items():
        if key in given and given[key] not in neutral:
            raise ValueError(f"load_adapter: {path}: {key}: expected {neutral[0]!r}, got {given[key]!r} (unsupported)")
    known = {f.name: given[f.name] for f in fields(LoraConfig) if given.get(f.name) is not None}
    try:
        config, saved = LoraConfig(**_PEFTS_DEFAULTS | known), _listed(given, "modules_to_save", str, _SAVED_WHOLE)
        return config, saved, _demands(given, saved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from error


def _demands(given: dict[str, Any], saved: list[str]) -> Callable[[str], bool]:
    """Whether this config of PEFT's demands tensors of a layer of this name that its target_modules match."""
    targets, exclude = given.get("target_modules"), given.get("exclude_modules")
    excluded, patterns = _listed(given, "exclude_modules", str), _listed(given, "layers_pattern", str, _BLOCK)
    indexes = _listed(given, "layers_to_transform", int)

    saved_whole = [re.compile(_SAVED_WHOLE.format(each)) for each in saved]  # here: re's cache keeps 512
    blocks = [_BLOCK.format(pattern) for pattern in patterns]

    def demands(name: str) -> bool:
        if targets is None:  # PEFT goes by the kind of model
            return False
        if re.fullmatch(exclude, name) if isinstance(exclude, str) else is_named(name, excluded):
            return False
        if any(pattern.match(name) for pattern in saved_whole):
            return False
        if not indexes or isinstance(targets, str) or name in targets:
            return True
        matches = (re.match(block, name) for block in blocks or [r".*?\.[^.]*\.(?P<index>\d+)\."])
        return next((int(match["index"]) in indexes for match in matches if match and match["index"]), False)

    return demands


def _listed(given: dict[str, Any], key: str, kind: type, within: str = "{}") -> list[Any]:
    """A field that may hold several, one alone, or nothing; a str is used within this regular expression."""
    value = given.get(key)
    values = [] if value in (None, "") else value if isinstance(value, list) else [value]
    if not all(isinstance(each, kind) for each in values):
        raise ValueError(f"{key}: expected {kind.__name__} or a list of {kind.__name__}, got {value!r}")
    for each in values if kind is str else []:
        check_regex(key, each, within)
    return values
