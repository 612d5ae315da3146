"""Full fine-tuning, LoRA and QLoRA side by side on the demo: trainable parameters, memory, speed and held-out loss.

The source's comparison: QLoRA, arXiv 2305.14314, tables 1 and 4.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import demo_runs
import record

KEPT = (
    *("model", "data", "batch", "lr", "seed"),
    "method",
    "base_bits",
    "total_parameters",
    "trainable_parameters",
    "trainable_percent",
    "base_bytes",
    "adapter_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "peak_rss_bytes",
    "tokens_per_second",
    "held_out_loss_before",
    "held_out_loss_after",
    "dtype",
    "step",
    "examples",
)


def main() -> None:
    parser = demo_runs.parser(__doc__)
    methods = list(demo_runs.LEARNING_RATE)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            report = demo_runs.run(method, options, Path(folder) / method)
            rows.append({"bench": "compare_methods"} | {key: report[key] for key in KEPT})
    record.write("compare_methods", rows, smoke=options.smoke)


if __name__ == "__main__":
    main()
