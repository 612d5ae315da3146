"""Whether a model runs, and takes the examples: checked before anything of an earlier run is replaced."""

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_ext import Linear4bit, LoraLinear

from .data import Dataset


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input of a model that has a table of positions; None where they are computed (rotary embeddings)."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]  # GPT-J's
    # OPT's has two rows more.
    return limit if limit is not None and any(limit <= len(table) <= limit + 2 for table in tables) else None


def check_fits(model: PreTrainedModel, data: Dataset, pad_id: int) -> None:
    """Raise ValueError, naming both numbers, when a token or the length of an example is beyond the model's tables."""
    examples = [example.input_ids for example in (*data.train, *data.held_out)]
    name, rows = type(model).__name__, len(next(model.get_input_embeddings().parameters()))
    if (highest := max(pad_id, *map(max, examples))) >= rows:
        raise ValueError(f"--model: tokenizer: expected ids below the {rows} rows of {name}'s embedding, got {highest}")
    limit = position_limit(model)
    if limit is not None and (longest := max(map(len, examples))) > limit:
        raise ValueError(f"--max-length: expected at most the {limit} positions of {name}, got {longest} in an example")


@torch.no_grad()
def check_runs(model: PreTrainedModel) -> None:
    """Raise ValueError when a model with a base of 4 bits reads a weight in them, instead of calling its layer."""
    training = model.training
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        model.train()(input_ids=token, use_cache=False)  # in training Mamba reads more layers
    except AttributeError as error:
        if not isinstance(error.obj, LoraLinear | Linear4bit):
            raise
        layer = next(name for name, module in model.named_modules() if module is error.obj)
        leaf = layer.rpartition(".")[2]
        reason = f"expected layers that are called, but {layer} is read ({error}): add --skip {leaf}"
        raise ValueError(f"{type(model).__name__}: {reason}") from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = f"expected layers in 4 bits that are called, but perhaps one is read ({error}): name it with --skip"
        raise ValueError(f"{type(model).__name__}: {reason}") from error
    finally:
        model.train(training)
