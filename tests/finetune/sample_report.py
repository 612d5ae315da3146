"""The report of a run that nobody has made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qlora_ext.finetune.optimizer import StatesReport


def a_report(**changes: Any) -> dict[str, Any]:
    sample = {"prompt": "hi?", "reference": "yes ✓", "before": "no", "after": "yes"}
    counts = {"trainable_parameters": 1234, "trainable_percent": 1.5, "base_bits": 4.126}
    sizes = {"base_bytes": 3 * 2**20, "adapter_bytes": 2**19, "gradient_bytes": 2**19, "optimizer_bytes": 2**20}
    states = StatesReport(
        host_bytes=2**18, file_bytes=3 * 2**18, ring_bytes=2**16, moved_bytes=5 * 2**20, hit_rate=0.25
    )
    losses = {
        "held_out_loss_before": 3.0,
        "held_out_loss_after": 2.0,
        "held_out_losses": [(1, 2.5)],
        "losses": [3.5, 2.5],
    }
    return {
        **{"method": "qlora", "step": 2, "tokens_per_second": 321.4, "peak_rss_bytes": 7 * 2**20, "samples": [sample]},
        **{"optimizer": {"kind": "paged_adamw32", **asdict(states)}},
        **{**counts, **sizes, **losses, **changes},
    }
