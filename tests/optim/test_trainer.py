"""transformers.Trainer with PagedAdamW as its optimizer: clipping, accumulation, a schedule, saving and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import KIB
from tiny_model import one_thread as one_thread
from tiny_model import tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from qlora_ext import PagedAdamW

STEPS, SAVED = 6, 3
EXAMPLES = [{"input_ids": ids, "labels": ids} for ids in torch.randint(258, (14, 12), generator=torch.Generator())]


def trainer(folder: Path, options: dict[str, Any] | None) -> Trainer:
    """A Trainer of the tiny model; None: its own AdamW. An epoch is 7 batches, so one step has fewer of them."""
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_grad_norm=0.5,
        save_steps=SAVED,
        logging_steps=1,
        optim="adamw_torch",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    chosen = None if options is None else (PagedAdamW, {"lr": arguments.learning_rate, **options})
    model = LlamaForCausalLM(tiny_config())
    return Trainer(model=model, args=arguments, train_dataset=EXAMPLES, optimizer_cls_and_kwargs=chosen)


def parameters(of: Trainer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in of.model.named_parameters()}


def logged(of: Trainer, what: str) -> list[float]:
    return [entry[what] for entry in of.state.log_history if what in entry]


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, where: str, state_bits: int) -> None:
    options: dict[str, Any] = {"state_bits": state_bits, "page_bytes": 16 * KIB}
    if where == "file":
        options |= {"host_budget": 100 * KIB, "page_file": tmp_path / "pages"}
    whole = trainer(tmp_path / "whole", options)
    whole.train()
    optimizer = whole.optimizer.optimizer  # in accelerate's wrapper
    assert isinstance(optimizer, PagedAdamW)
    assert (optimizer.stats()["pages"]["file"] > 0) == (where == "file")
    assert max(logged(whole, "grad_norm")) > 0.5, "so gradients were clipped"
    assert len(set(logged(whole, "learning_rate"))) == STEPS
    optimizer.release()
    assert not (tmp_path / "pages").exists()

    resumed = trainer(tmp_path / "resumed", options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for name, p in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], p), name


@pytest.mark.parametrize(("first", "second"), [({}, {}), (None, {}), ({}, None)], ids=["ours", "to ours", "to torch's"])
def test_it_trains_as_torchs_adamw_and_on_from_its_checkpoint(
    tmp_path: Path, first: dict[str, Any] | None, second: dict[str, Any] | None
) -> None:
    expected = trainer(tmp_path / "expected", None)
    expected.train()
    trainer(tmp_path / "first", first).train()
    resumed = trainer(tmp_path / "second", second)
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{SAVED}"))
    for what in ("loss", "grad_norm", "learning_rate"):
        assert logged(resumed, what) == pytest.approx(logged(expected, what), rel=1e-4), what
