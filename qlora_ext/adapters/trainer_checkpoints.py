"""Checkpoints of transformers.Trainer that hold the adapter and never the base."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_ext.adapters.files import load_adapter, save_adapter
from qlora_ext.model_layers import adapter_names, lora_layers


class AdapterCheckpoints:
    """For Trainer and its subclasses, TRL's among them, whose model has one active adapter.

    `class AdapterTrainer(AdapterCheckpoints, Trainer)` saves what `save_adapter` writes, with the tokenizer if it has
    one, and resumes from it; a Trainer that does not know the adapter saves base and adapter as one state_dict, which
    `from_pretrained` does not read.
    """

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        save_adapter(self.model, folder, _adapter(self.model))
        if (tokenizer := getattr(self, "processing_class", None)) is not None:
            tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        load_adapter(model, resume_from_checkpoint, _adapter(model))

    def _load_best_model(self: Any) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint, _adapter(self.model))


def _adapter(model: nn.Module) -> str:
    """The name of the one that is saved and loaded."""
    active = {name for _, layer in lora_layers(model) for name in layer.active_adapters}
    names = sorted(active) or adapter_names(model) or ["default"]
    if len(names) > 1:
        raise ValueError(f"AdapterCheckpoints: model: expected one active adapter, got {names}")
    return names[0]
