"""Which layers of a model get the adapter."""

import re

from transformers import PreTrainedModel

from qlora_ext.lora.names import check_regex
from qlora_ext.model_layers import named_layers

# PEFT refuses an adapter on these layers of these models, so one with them could not be loaded there after training.
MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
REFUSED_BY_PEFT = frozenset({"out_proj", "conv1d"})


def target_modules(text: str, model: PreTrainedModel) -> str | list[str]:
    """What a LoraConfig takes for --target-modules: "all-linear", a regex, or names that came with commas; none: [].

    Of "all-linear" those that PEFT refuses are left out.

    Raises: ValueError when the text is no regex, or names layers that PEFT refuses.
    """
    wanted: str | list[str] = text
    if text == "none":
        return []
    if re.fullmatch(r"[\w.]+(,[\w.]+)*", text):
        wanted = text.split(",")
    check_regex("--target-modules", text)
    kind = model.config.model_type
    leaves = {name.rpartition(".")[2] for name in named_layers(model, wanted)} if kind in MAMBA else set()
    if not leaves & REFUSED_BY_PEFT:
        return wanted
    if text == "all-linear":
        return sorted(leaves - REFUSED_BY_PEFT)
    refused = ", ".join(sorted(leaves & REFUSED_BY_PEFT))
    raise ValueError(f"--target-modules: expected layers that PEFT takes in a model of type {kind}, got {refused}")
