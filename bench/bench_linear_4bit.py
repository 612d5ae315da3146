"""linear_4bit, y = x @ W.T with a 4-bit weight, against every other way to multiply by one on a CPU.

Checked first: ours is at most twice as far from the fp64 product with the fp32-decoded weight as torch's own product.
Limit: the bytes of the weight, x and y at the read bandwidth of memory (cold) or cache (hot), or the flops at the peak
of the dtype, whichever takes longer.
"""

from __future__ import annotations

from functools import partial

import suite
import torch
from linear_providers import linear, product_case

if __name__ == "__main__":
    with torch.no_grad():
        suite.main(
            "linear_4bit", __doc__, [suite.Bench("linear_4bit", linear, partial(product_case, transposed=False))]
        )
