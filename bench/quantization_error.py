"""Bits against error: what NF4 and FP4 lose on normal weights, for each blocksize, double quantization off and on."""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import record
import torch
from exactness import distance

import qlora_ext

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def error_row(weight: torch.Tensor, quant_type: str, blocksize: int, double_quant: bool) -> dict[str, Any]:
    """Bits a weight, counted from the tensors, and the RMS error as a fraction of the weights' own RMS."""
    packed, state = qlora_ext.quantize_4bit(
        weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
    )
    stored = [packed, state.absmax, *(t for t in (state.nested_absmax, state.nested_offset) if t is not None)]
    return {
        "bench": "quantization_error",
        "shape": list(weight.shape),
        "quant_type": quant_type,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "bits": 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored) / weight.numel(),
        "rms_error": distance(weight, qlora_ext.dequantize_4bit(packed, state)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight, a multiple of 4096")
    parser.add_argument("--smoke", action="store_true", help="few rows and no record, to see that it runs")
    args = parser.parse_args()
    rows = 4 if args.smoke else args.size
    weight = torch.randn(rows, args.size, generator=torch.Generator().manual_seed(0))
    forms = product(("nf4", "fp4"), (False, True), BLOCKSIZES)
    errors = [error_row(weight, kind, blocksize, double_quant) for kind, double_quant, blocksize in forms]
    record.write("quantization_error", errors, smoke=args.smoke, every_machine=True)


if __name__ == "__main__":
    main()
