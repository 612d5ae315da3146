"""dequantize_4bit to the weight's dtype, double quantization on and off, against bitsandbytes and torchao.

Checked first: values equal the reference's bit for bit. Limit: as in bench_quantize_4bit.py.
"""

from __future__ import annotations

import suite
from format_providers import dequantize, dequantize_case

if __name__ == "__main__":
    benches = [
        suite.Bench("dequantize_4bit", dequantize, dequantize_case, by_rows=False, double_quant=double_quant)
        for double_quant in (True, False)
    ]
    suite.main("dequantize_4bit", __doc__, benches, by_rows=False)
