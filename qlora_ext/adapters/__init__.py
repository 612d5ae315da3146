"""LoRA adapters on a whole model."""

from qlora_ext.adapters.attach import add_adapter, delete_adapter, set_adapter
from qlora_ext.adapters.files import load_adapter, save_adapter
from qlora_ext.adapters.merge import merge_adapter, unmerge_adapter

__all__ = [
    "add_adapter",
    "delete_adapter",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
