"""linear_4bit_dgrad, grad_x = grad @ W with a 4-bit weight: what each layer below pays in the backward pass.

Checked and bounded as in bench_linear_4bit.py.
"""

from __future__ import annotations

from functools import partial

import suite
import torch
from linear_providers import dgrad, product_case

if __name__ == "__main__":
    with torch.no_grad():
        bench = suite.Bench("linear_4bit_dgrad", dgrad, partial(product_case, transposed=True))
        suite.main("linear_4bit_dgrad", __doc__, [bench])
