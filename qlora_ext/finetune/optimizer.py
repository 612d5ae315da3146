"""The optimizer of a fine-tuning run: which one, and where its states are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_ext import PagedAdamW

STATE_BITS = {"paged_adamw32": 32, "paged_adamw8": 8}
KINDS = ("adamw", *STATE_BITS)  # adamw: torch.optim.AdamW


@dataclass(frozen=True)
class OptimizerChoice:
    """One of KINDS, and how a paged one pages: see PagedAdamW."""

    kind: str = "adamw"
    device_budget: int | None = None
    host_budget: int | None = None
    page_file: Path | None = None


@dataclass(frozen=True)
class StatesReport:
    """Where an optimizer's states are, in whole pages if it is paged, and what has moved, checkpoints included."""

    device_bytes: int = 0
    host_bytes: int = 0
    file_bytes: int = 0
    ring_bytes: int = 0  # memory beside that, which the states that move stream through
    moved_bytes: int = 0  # in and out
    hit_rate: float = 1.0  # pages that were computed where they are
    seconds_waited: float = 0.0  # for moves

    @property
    def state_bytes(self) -> int:
        """Of all states, wherever they are."""
        return self.device_bytes + self.host_bytes + self.file_bytes


def check_page_file(path: Path) -> None:
    """Raise ValueError or OSError as a paged optimizer would at its first step, if that cannot page to this file."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = PagedAdamW([parameter], page_file=path)
    try:
        optimizer.step()
    finally:
        optimizer.release()


def for_trainer(choice: OptimizerChoice, arguments: Any) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """What transformers.Trainer takes as optimizer_cls_and_kwargs; None leaves it to make its own AdamW.

    Args:
        arguments: the TrainingArguments, whose learning rate, betas and epsilon a paged optimizer has, too.
    """
    if choice.kind == "adamw":
        return None
    options: dict[str, Any] = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "state_bits": STATE_BITS[choice.kind],
        "device_budget": choice.device_budget,
        "host_budget": choice.host_budget,
        "page_file": choice.page_file,
    }
    return PagedAdamW, options


def paged(optimizer: Any) -> PagedAdamW | None:
    """The PagedAdamW that this is, or that accelerate has wrapped; None for any other optimizer, or none yet."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, PagedAdamW) else None


def where_states_are(optimizer: Any) -> StatesReport:
    """Count the bytes of an optimizer's states, of torch's kind or paged."""
    if (inner := paged(optimizer)) is None:
        tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        on_host = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")
        return StatesReport(device_bytes=sum(tensor.nbytes for tensor in tensors) - on_host, host_bytes=on_host)
    stats = inner.stats()
    size = stats["page_bytes"]
    return StatesReport(
        device_bytes=stats["pages"]["device"] * size,
        host_bytes=stats["pages"]["host"] * size,
        file_bytes=stats["pages"]["file"] * size,
        ring_bytes=stats["ring_pages"] * size,
        moved_bytes=sum(stats["bytes_read"].values()),
        hit_rate=stats["hit_rate"],
        seconds_waited=stats["seconds_waited"],
    )
