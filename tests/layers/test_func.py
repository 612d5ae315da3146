"""What README.md says of torch.func and batches of gradients: it raises, or gives what a loop does, nothing else."""

from __future__ import annotations

import pytest
import torch
from random_layers import BASES, make_base, make_linear, make_lora, with_gradients
from torch import Tensor, nn

from qlora_ext import LoraConfig

RAISED = r"functorch|vmap|[Bb]atching rule|jvp|forward mode AD"
LAYERS = {"Linear4bit": make_linear, "an adapter": lambda: make_lora(make_base("Linear4bit"), LoraConfig())}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_torch_func_raise(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(3, 256)
    for transform in (
        lambda: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda: torch.func.vjp(layer, x)[1](torch.ones(3, 48)),
        lambda: torch.func.jvp(layer, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=RAISED):
            transform()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_layer_is_a_loop_and_of_an_adapter_raises() -> None:
    layer, x = make_linear(), torch.randn(2, 3, 256)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    with pytest.raises(RuntimeError, match=RAISED):
        torch.func.vmap(make_lora(make_base("Linear4bit"), LoraConfig()))(x)


def batched_gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    y, grads = layer(x), torch.randn(4, 3, 48)
    (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    return batched, torch.stack([torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batches_of_gradients() -> None:
    torch.testing.assert_close(*batched_gradients(make_linear(), torch.randn(3, 256)))
    with pytest.raises(RuntimeError, match=RAISED):
        batched_gradients(make_lora(make_base("Linear4bit"), LoraConfig()), torch.randn(3, 256))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_dense_bases_know_all_of_it() -> None:
    layer, x = make_lora(make_base(BASES[0]), LoraConfig()), torch.randn(3, 256)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), with_gradients(layer, [x])[1])
    torch.testing.assert_close(*batched_gradients(layer, x))
