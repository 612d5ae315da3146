"""The paged optimizer."""

from qlora_ext.optim.paged_adamw import PagedAdamW

__all__ = ["PagedAdamW"]
