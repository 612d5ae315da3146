"""quantize_4bit of one weight, double quantization on and off, against bitsandbytes and torchao.

Checked first: bytes and scales equal the reference's. Limit: the weight's bytes and those of its 4-bit form at the
bandwidth of copying.
"""

from __future__ import annotations

import suite
from format_providers import quantize, quantize_case

if __name__ == "__main__":
    benches = [
        suite.Bench("quantize_4bit", quantize, quantize_case, by_rows=False, double_quant=double_quant)
        for double_quant in (True, False)
    ]
    suite.main("quantize_4bit", __doc__, benches, by_rows=False)
