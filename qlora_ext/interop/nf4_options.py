"""The options of NF4Config, which transformers and diffusers each know by a class of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from qlora_ext.functional import quantize_4bit
from qlora_ext.model_layers import HEADS
from qlora_ext.quant_state import check_type

METHOD = "qlora_ext"  # the quant_method in a config.json


class NF4Options:
    """How `from_pretrained(..., quantization_config=NF4Config())` quantizes a model while it loads it.

    Args:
        quant_type: "nf4" or "fp4".
        blocksize: weights per absmax, a power of two from 32 to 4096.
        double_quant: absmax in 8 bits: 4.127 instead of 4.5 bits a weight at blocksize 64.
        modules_to_not_convert: names, or last parts of names, of what stays as it is. None: what `quantize_model`
            leaves, the heads (lm_head, score, classifier, qa_outputs, the output embeddings). Tied weights and what the
            model keeps in float32 stay in any case.

    Raises:
        TypeError, ValueError: as `quantize_4bit`; modules_to_not_convert is no list of names, or there is another key.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        modules_to_not_convert: Iterable[str] | None = None,
        **others: Any,
    ) -> None:
        if others.pop("quant_method", METHOD) != METHOD or others:
            expected = "quant_type, blocksize, double_quant, modules_to_not_convert"
            raise ValueError(f"NF4Config: expected {expected}, got {sorted(others) or 'another quant_method'} as well")
        check_type("NF4Config", "quant_type", quant_type, str)
        check_type("NF4Config", "blocksize", blocksize, int)
        check_type("NF4Config", "double_quant", double_quant, bool)
        quantize_4bit(torch.empty(0), quant_type=quant_type, blocksize=blocksize)  # the kernel's own checks
        names = modules_to_not_convert
        if names is not None:
            if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
                raise TypeError(f"NF4Config: modules_to_not_convert: expected a list of names, got {names!r}")
            names = list(names)
        self.quant_method: Any = METHOD
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.modules_to_not_convert = names

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `quantize_4bit`."""
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.double_quant}

    @property
    def skip(self) -> Iterable[str]:
        """quantize_model's."""
        return HEADS if self.modules_to_not_convert is None else self.modules_to_not_convert
