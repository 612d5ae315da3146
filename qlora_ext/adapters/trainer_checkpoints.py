"""Checkpoints of transformers.Trainer that hold the adapter and never the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_ext.adapters.files import resume_adapter, save_adapter
from qlora_ext.adapters.trained_modules import trained_modules
from qlora_ext.model_layers import adapter_names, lora_layers
from qlora_ext.sharded import is_dtensor, reshard


class AdapterCheckpoints:
    """For Trainer and its subclasses, TRL's among them, whose model has one active adapter.

    `class AdapterTrainer(AdapterCheckpoints, Trainer)` saves what `save_adapter` writes, with the tokenizer if it has
    one and the training arguments, and resumes from it: values, r and alpha come from the checkpoint; dropout, what
    trains and what is frozen stay as they are. A Trainer that does not know the adapter saves base and adapter as one
    state_dict, which `from_pretrained` does not read. Of several processes only those save that Trainer lets save;
    of a model that FSDP2 has sharded all write the adapter, the same files.

    `train` raises ValueError, before the first step, if the model has no adapter or several active ones, or if
    `save_adapter` would refuse what is trained beside it.
    """

    def train(self: Any, *args: Any, **options: Any) -> Any:
        _adapter(self.model)
        trained_modules(self.model)
        return super().train(*args, **options)  # type: ignore[misc]

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        reshard(self.model)
        is_sharded = any(map(is_dtensor, self.model.parameters()))  # then saving needs all processes
        if not self.args.should_save and not is_sharded:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        save_adapter(self.model, folder, _adapter(self.model))
        if not self.args.should_save:
            return
        tokenizer = getattr(self, "processing_class", None) or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, Path(folder) / "training_args.bin")

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        resume_adapter(model, resume_from_checkpoint, _adapter(model))

    def _load_best_model(self: Any) -> None:
        resume_adapter(self.model, self.state.best_model_checkpoint, _adapter(self.model))


def _adapter(model: nn.Module) -> str:
    """The name of the one that is saved and loaded."""
    active = {name for _, layer in lora_layers(model) for name in layer.active_adapters}
    names = sorted(active) or adapter_names(model)
    if len(names) != 1:
        got = names or "none (add_adapter gives one)"
        raise ValueError(f"AdapterCheckpoints: model: expected one active adapter, got {got}")
    return names[0]
