"""Shapes (N, K) = (out, in) of the linear layers of real models, and the numbers of rows that benches multiply."""

from __future__ import annotations

import re

Shape = tuple[int, int]

MODELS: dict[str, dict[str, Shape]] = {
    "SmolLM2-135M": {
        "q_proj, o_proj": (576, 576),
        "k_proj, v_proj": (192, 576),
        "gate_proj, up_proj": (1536, 576),
        "down_proj": (576, 1536),
    },
    "Llama-7B": {
        "q_proj, k_proj, v_proj, o_proj": (4096, 4096),
        "gate_proj, up_proj": (11008, 4096),
        "down_proj": (4096, 11008),
    },
    "Llama-13B": {
        "q_proj, k_proj, v_proj, o_proj": (5120, 5120),
        "gate_proj, up_proj": (13824, 5120),
        "down_proj": (5120, 13824),
    },
    "Llama-2-70B": {
        "q_proj, o_proj": (8192, 8192),
        "k_proj, v_proj": (1024, 8192),
        "gate_proj, up_proj": (28672, 8192),
        "down_proj": (8192, 28672),
    },
}
DEFAULT = ("4096x4096", "14336x4096")  # the second is gate_proj and up_proj of Llama 3 8B
ROWS = (1, 2, 3, 4, 8, 16, 32, 128, 512, 2048)


def select(names: list[str]) -> list[Shape]:
    """The shapes that these names stand for, each once: a model's name (all its layers), or NxK."""
    shapes: dict[Shape, None] = {}
    for name in names:
        if name in MODELS:
            shapes |= dict.fromkeys(MODELS[name].values())
        elif match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            shapes[int(match[1]), int(match[2])] = None
        else:
            raise ValueError(f"shape: expected NxK or one of {', '.join(MODELS)}, got {name!r}")
    return list(shapes)
