"""The loss of a batch, with its logits whole or made a chunk of tokens at a time.

A vocabulary of 50,000 makes the logits the largest tensors of a step: of 512 tokens 100 MB in fp32, four times over (as
logits, as log-probabilities, and as the gradient of both). Chunked, the output head, the loss and the gradients of both
are computed for `chunk` tokens together, and only the gradients stay: nothing is computed twice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from .encode import IGNORE

CACHED = 2**19  # numbers in fp32 that a core's cache and a share of the last level hold
CHUNK_ON_CPU, CHUNK_ON_GPU = 256, 1024  # tokens: as fast as all at once, or faster (bench/NOTES.md; a GPU: estimated)


def answer_loss(model: PreTrainedModel, batch: dict[str, Tensor], chunk: int | None = None) -> tuple[Tensor, int]:
    """Summed cross entropy of a batch over its labelled tokens, in nats, and how many those are.

    Logits are computed only where a label is predicted: those of all positions could take most of a step's memory.

    Args:
        batch: input_ids, attention_mask and labels, int64 [examples, length], on the model's device.
        chunk: tokens whose logits exist together; None: all. Only for a model that `check_head` accepts.
    """
    labels = batch["labels"][:, 1:]
    labelled = F.pad(labels != IGNORE, (0, 1))  # the position that predicts a label is the one before it
    wanted = labels[labels != IGNORE]
    hidden: list[Tensor] = []

    def before_head(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        hidden.append(inputs[0][labelled])
        return hidden[0] if chunk is None else hidden[0].new_empty(0, hidden[0].shape[1])

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(before_head)
    try:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    if chunk is None:
        return F.cross_entropy(logits.float(), wanted, reduction="sum"), len(wanted)
    return chunked_cross_entropy(hidden[0], head, wanted, chunk), len(wanted)


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int) -> Tensor:
    """F.cross_entropy(head(hidden).float(), labels, reduction="sum"), the logits of `chunk` tokens at a time.

    Args:
        hidden: [tokens, hidden_size]; its gradient, and that of the head's trainable parameters, is made here.
        head: [..., hidden_size] -> [..., vocabulary], one token independent of the others.
        labels: int64 [tokens], each a word of the vocabulary.
        chunk: tokens, at least 1.

    Returns: the sum in float32, 0-d.
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    apply: Any = _ChunkedCrossEntropy.apply  # of which torch's releases tell mypy different things
    loss: Tensor = apply(hidden, head, labels, chunk, torch.is_grad_enabled(), *parameters)
    return loss


def _summed(logits: Tensor, labels: Tensor, d_logits: Tensor | None) -> Tensor:
    """Summed cross entropy in float32, and its gradient to d_logits: on the CPU of as many rows as a cache holds."""
    rows = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    loss = logits.new_zeros((), dtype=torch.float32)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        log_probabilities = F.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        loss -= log_probabilities.gather(1, labels[part]).sum()
        if d_logits is not None:  # probabilities, less one at the label; in the place of their logarithms
            less = torch.full_like(labels[part], -1, dtype=torch.float32)
            d_logits[part] = log_probabilities.exp_().scatter_add_(1, labels[part], less)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int, trains: bool, *parameters: Tensor
    ) -> Tensor:
        inputs = [hidden, *parameters]
        wanted = [trains and tensor.requires_grad for tensor in inputs]
        grads = [torch.empty_like(hidden) if wanted[0] else None]  # written, not summed
        for parameter, w in zip(parameters, wanted[1:], strict=True):
            # In float32: a sum over many chunks in the parameter's own dtype would lose bits.
            grads.append(torch.zeros_like(parameter, dtype=torch.float32) if w else None)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels), chunk):
            rows = hidden[start : start + chunk].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                logits = head(rows)
            d_logits = torch.empty_like(logits.detach()) if any(wanted) else None
            loss += _summed(logits.detach(), labels[start : start + chunk, None], d_logits)
            if d_logits is None:
                continue
            leaves = [tensor for tensor, w in zip([rows, *parameters], wanted, strict=True) if w]
            found = iter(torch.autograd.grad(logits, leaves, d_logits, allow_unused=True))
            for index, total in enumerate(grads):
                if total is None or (grad := next(found)) is None:
                    continue
                if index == 0:
                    total[start : start + chunk] = grad
                else:
                    total += grad
        kept = [None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
        ctx.save_for_backward(*kept)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return hidden, None, None, None, None, *parameters


def suitable_chunk(model: PreTrainedModel) -> int | None:
    """Tokens whose logits should exist together, for little memory at no cost in time; None: all.

    All of them for a head that `check_head` refuses, and for one that trains: each chunk would add to the gradient of
    the whole head.
    """
    try:
        check_head(model)
    except ValueError:
        return None
    head: nn.Module = model.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return CHUNK_ON_CPU if model.device.type == "cpu" else CHUNK_ON_GPU


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the model, unless its logits are what its module `lm_head` returns, and no more.

    Some models scale or cap the head's result (Cohere, Gemma 2): one token goes through the model, with numbers that
    such a change would show put in the place of that result.
    """
    name = type(model).__name__
    head: Any = getattr(model, "lm_head", None)
    output = model.get_output_embeddings()
    if head is None or head is not output:
        found = next((name for name, module in model.named_modules() if module is output), None)
        raise ValueError(f"--loss-chunk: {name}: expected the output head lm_head, got {found!r}")
    planted: list[Tensor] = []

    def plant(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        planted.append(torch.linspace(-100, 100, output.numel(), dtype=output.dtype).to(output.device).view_as(output))
        return planted[-1].clone()

    hook = head.register_forward_hook(plant)
    training = model.training
    try:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        logits = model.eval()(input_ids=token, use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    if len(planted) != 1 or not torch.equal(logits, planted[0]):
        raise ValueError(f"--loss-chunk: {name}: expected the result of lm_head as logits, got it changed by the model")
