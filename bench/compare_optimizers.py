"""The optimizers of `finetune` side by side on the demo, for QLoRA and full fine-tuning: loss, memory and speed.

A wrong loss is a failure: torch's AdamW and 8-bit states must end within 1 % of 32-bit states, and states in a page
file exactly where those in memory do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import demo_runs
import record
import torch

TORCH, PAGED, PAGED_8BIT, IN_FILE = "adamw", "paged_adamw32", "paged_adamw8", "paged_adamw32, in a file"
OPTIMIZERS = (TORCH, PAGED, PAGED_8BIT, IN_FILE)
MOST_OFF = {TORCH: 0.01, PAGED_8BIT: 0.01, IN_FILE: 0.0}  # from the held-out loss of PAGED, as a fraction of it
KEPT = (
    *("model", "data", "batch", "lr", "seed", "method", "trainable_parameters", "dtype", "step"),
    *("optimizer", "optimizer_bytes", "peak_rss_bytes", "tokens_per_second"),
    *("held_out_loss_before", "held_out_loss_after"),
)


def run(method: str, optimizer: str, options: Any, folder: Path) -> dict[str, Any]:
    """Fine-tune with this optimizer and return the row of it."""
    kind, _, in_file = optimizer.partition(", ")
    more = ["--host-budget", "0", "--page-file", str(folder / "pages")] if in_file else []
    more += ["--device-budget", "0"] if in_file and torch.cuda.is_available() else []
    report = demo_runs.run(method, options, folder / method / optimizer, "--optimizer", kind, *more)
    row = {key: report[key] for key in KEPT}
    return {"bench": "compare_optimizers", "provider": optimizer} | row


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """The losses that are further off than they may be."""
    exact = {row["method"]: row["held_out_loss_after"] for row in rows if row["provider"] == PAGED}
    found = []
    for row in rows:
        most = MOST_OFF.get(row["provider"])
        if most is None or row["method"] not in exact:
            continue
        off = abs(row["held_out_loss_after"] / exact[row["method"]] - 1)
        if off > most:
            name = f"{row['method']}, {row['provider']}"
            found.append(f"{name}: its held-out loss is {off:.2%} off, more than {most:.1%}")
    return found


def main() -> None:
    parser = demo_runs.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(demo_runs.LEARNING_RATE), default=["qlora", "full"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(method, one, options, Path(folder)) for method in options.methods for one in options.optimizers]
    record.write("compare_optimizers", rows, smoke=options.smoke)
    sys.exit("\n".join(wrong(rows)) or None)


if __name__ == "__main__":
    main()
