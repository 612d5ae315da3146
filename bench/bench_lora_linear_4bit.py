"""A 4-bit layer with a LoRA adapter of rank 16: forward, with its cost over linear_4bit alone, and backward.

Layers are called as a model in training calls them, no dropout, no bias; ours is qlora_ext.LoraLinear. Checked first:
y, and dx, dA and dB, are each at most twice as far from the fp64 result as torch's own. Limits as in
bench_linear_4bit.py, with the bytes and flops of the low-rank products.
"""

from __future__ import annotations

import suite
from lora_providers import backward, backward_case, forward, forward_case

if __name__ == "__main__":
    benches = [
        suite.Bench("lora_linear_4bit forward", forward, forward_case),
        suite.Bench("lora_linear_4bit backward", backward, backward_case),
    ]
    suite.main("lora_linear_4bit", __doc__, benches)
