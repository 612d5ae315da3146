"""torch.compile of a model's layers, which share two graphs at most, whatever the length of a batch.

Trainer's own `torch_compile` takes the whole model: graphs that grow with the number of layers, broken where the rows
of the loss are chosen (their number depends on the labels), and compiled again for the second length that comes.
"""

from typing import Any

import torch._dynamo
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: PreTrainedModel, backend: Any = "inductor") -> int:
    """Compile every layer of the model in place, at its first call; return how many there are.

    The layers share their graphs: one for the first, whose input needs no gradient, and one for all the others.
    Nothing is compiled under `torch.compiler.set_stance("force_eager")`. Sets
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`, for the whole process.

    Args:
        backend: of torch.compile.

    Raises: ValueError when the model has no layers of the kind, or there is no C++ compiler for its device.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--compile: {type(model).__name__}: expected layers of transformers' kind, got none")
    if backend == "inductor" and model.device.type == "cpu":
        _check_compiler()
    # Layers of transformers >= 5.25 note, while they run, what stands in for some of their functions. Their forward in
    # a checkpoint is compiled whole only where the backward, which recomputes it, need not note it again.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # here, because it takes a second

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(f"--compile: expected a C++ compiler, got none ({error})") from error
