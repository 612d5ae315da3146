"""dequantize_4bit to the weight's dtype, double quantization on and off, against bitsandbytes and torchao.

Into a new tensor, whose memory the system hands out first where malloc has kept none, and into one that is given
(out=). Checked first: values equal the reference's bit for bit. Limit: as in bench_quantize_4bit.py.
"""

from __future__ import annotations

import suite
from format_providers import dequantize, dequantize_case, dequantize_out

if __name__ == "__main__":
    benches = [
        suite.Bench(op, providers, dequantize_case, by_rows=False, double_quant=double_quant)
        for op, providers in (("dequantize_4bit", dequantize), ("dequantize_4bit(out=)", dequantize_out))
        for double_quant in (True, False)
    ]
    suite.main("dequantize_4bit", __doc__, benches, by_rows=False)
