"""quantize_4bit and dequantize_4bit of one weight against bitsandbytes' CPU functions, double quantization off and on.

Limit: quantize reads 4 (fp32) or 2 (bf16) bytes a weight and writes 0.52; dequantize reads 0.52 and writes 2 or 4.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import bitsandbytes.functional as bnb
import record
import torch
from timing import interleaved, percentiles

import qlora_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=5, help="of measuring for each function")
    parser.add_argument("--smoke", action="store_true", help="a small matrix and no record, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.columns, args.seconds = 64, 256, 0.02

    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        weight = torch.randn(args.rows, args.columns, dtype=dtype)
        for double_quant in (False, True):
            mine = {"quant_type": "nf4", "blocksize": 64, "double_quant": double_quant}
            theirs = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": double_quant}
            packed, state = qlora_ext.quantize_4bit(weight, **mine)
            peer_packed, peer_state = bnb.quantize_4bit(weight, **theirs)
            assert torch.equal(packed.flatten(), peer_packed.flatten())
            providers = {
                ("quantize_4bit", "qlora_ext"): partial(qlora_ext.quantize_4bit, weight, **mine),
                ("quantize_4bit", "bitsandbytes"): partial(bnb.quantize_4bit, weight, **theirs),
                ("dequantize_4bit", "qlora_ext"): partial(qlora_ext.dequantize_4bit, packed, state),
                ("dequantize_4bit", "bitsandbytes"): partial(bnb.dequantize_4bit, peer_packed, peer_state),
            }
            for (op, provider), times in interleaved(providers, seconds=args.seconds).items():
                row = {"bench": op, "provider": provider, "shape": [args.rows, args.columns], "blocksize": 64}
                rows.append(row | {"dtype": str(dtype)[6:], "double_quant": double_quant} | percentiles(times))
    record.write("quantize_4bit", rows, smoke=args.smoke)


if __name__ == "__main__":
    main()
