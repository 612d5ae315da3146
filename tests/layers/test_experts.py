"""Experts4bit by itself: grouped_mm with a weight of three dimensions in 4 bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, pairwise
from expert_cases import ends
from reference import assert_as_exact_as_torch, assert_same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from qlora_ext import LoraConfig, add_adapter, merge_adapter, quantize_4bit, quantize_model
from qlora_ext.experts import Experts4bit


def with_grad(x: Tensor, weight: Tensor, offs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The product with each matrix [in, out], one after the other, and the gradient of x."""
    x = x.clone().requires_grad_()
    parts = [rows @ matrix for rows, matrix in zip(x.tensor_split(offs[:-1].long()), weight, strict=True)]
    torch.cat(parts).backward(grad)
    return torch.cat(parts).detach(), x.grad


SHAPES = {"groups": (128, 256), "blocks": (64, 64), "flat": (128, 96)}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "absmax in fp32": {"double_quant": False},
    "fp4": {"quant_type": "fp4", "blocksize": 128},
}
COUNTS = ((2, 5, 3), (0, 7, 0), (0, 0, 0))


@pytest.mark.parametrize(
    ("is_transposed", "dtype_name", "shape", "options_name", "counts"),
    pairwise((False, True), DTYPES, SHAPES, OPTIONS, COUNTS),
    ids=str,
)
def test_products(is_transposed: bool, dtype_name: str, shape: str, options_name: str, counts: tuple[int, ...]) -> None:
    dtype, (rows, columns), options = DTYPES[dtype_name], SHAPES[shape], OPTIONS[options_name]
    weight = torch.randn(3, rows, columns).to(dtype)
    experts = Experts4bit(weight, is_transposed=is_transposed, **options)
    whole_groups = rows * columns % (256 * options.get("blocksize", 64)) == 0
    assert experts.stack.double_quant == (whole_groups and options.get("double_quant", True))
    decoded = experts.dequantize()
    assert (decoded.shape, decoded.dtype) == (weight.shape, dtype)
    packed, state = quantize_4bit(weight.flatten(0, 1), **{**options, "double_quant": experts.stack.double_quant})
    assert_same(experts.stack.weight, packed)
    assert_same(experts.stack.absmax, state.absmax)

    mat_b, dense = (experts, decoded) if is_transposed else (experts.transpose(-2, -1), decoded.mT)
    x, grad = (torch.randn(sum(counts), size).to(dtype) for size in dense.shape[1:])
    leaf = x.clone().requires_grad_()
    y = F.grouped_mm(leaf, mat_b, offs=ends(*counts))
    y.backward(grad)
    exact = with_grad(x.double(), dense.double(), ends(*counts), grad.double())
    of_torch = with_grad(x, dense, ends(*counts), grad)
    for results in zip((y.detach(), leaf.grad), of_torch, exact, strict=True):
        assert_as_exact_as_torch(*results)


def test_rows_behind_the_last_end_are_zeros() -> None:
    """As those of tokens whose experts other processes have."""
    experts = Experts4bit(torch.randn(2, 64, 64))
    x = torch.randn(6, 64).requires_grad_()
    y = F.grouped_mm(x, experts.transpose(1, 2), offs=ends(1, 3))
    assert_same(y[:4], F.grouped_mm(x[:4], experts.transpose(2, 1), offs=ends(1, 3)))
    assert not y[4:].any()
    y.sum().backward()
    assert x.grad[:4].all()
    assert not x.grad[4:].any()


def test_only_grouped_mm_takes_them_and_says_what_it_wants() -> None:
    experts = Experts4bit(torch.randn(2, 64, 128))
    transposed, offs = experts.transpose(-2, -1), ends(1, 2)
    assert (transposed.dtype, transposed.device) == (torch.float32, torch.device("cpu"))
    x = torch.randn(3, 128)
    for use in (torch.relu, lambda w: F.linear(x, w), lambda w: x @ w):
        for weight in (experts, transposed):
            with pytest.raises(TypeError):
                use(weight)
    for x_given, weight, options, message in (
        (x, experts, {"offs": offs}, r"mat_b: expected experts\.transpose\(-2, -1\), got Experts4bit"),
        (x, transposed, {}, "grouped_mm: expected .*, the experts and offs alone, got .*'Transposed', 'NoneType'"),
        (x, transposed, {"offs": offs, "bias": x[0]}, "grouped_mm: expected a tensor, the experts and offs alone"),
        (
            x,
            transposed,
            {"offs": offs, "out_dtype": torch.float32},
            "grouped_mm: expected a tensor, the experts and offs",
        ),
        (transposed, transposed, {"offs": offs}, "grouped_mm: expected a tensor, the experts and offs alone"),
        (x[:, 1:], transposed, {"offs": offs}, r"mat_a: expected \[rows, 128\], got \[3, 127\]"),
        (x[0], transposed, {"offs": offs}, r"mat_a: expected \[rows, 128\], got \[128\]"),
        (x, transposed, {"offs": ends(1, 1, 1)}, r"offs: expected integers \[2\], got torch\.int32 \[3\]"),
        (x, transposed, {"offs": offs.float()}, r"offs: expected integers \[2\], got torch\.float32 \[2\]"),
        (x, transposed, {"offs": offs[0]}, r"offs: expected integers \[2\], got torch\.int32 \[\]"),
    ):
        with pytest.raises(ValueError, match=f"Experts4bit: {message}"):
            F.grouped_mm(x_given, weight, **options)
    with pytest.raises(ValueError, match="Experts4bit: transpose: expected the last two dimensions, got 0 and 1"):
        experts.transpose(0, 1)
    with pytest.raises(ValueError, match=r"mat_b: expected the experts themselves, got Transposed"):
        F.grouped_mm(x, Experts4bit(torch.randn(2, 128, 64), is_transposed=True).transpose(1, 2), offs=offs)
    with pytest.raises(ValueError, match=r"experts_4bit: offs: expected ascending ends of at most 3 rows, got"):
        F.grouped_mm(x, transposed, offs=ends(1, 3))
    with pytest.raises(TypeError, match=r"experts_4bit: x: expected dtype .*Double"):
        F.grouped_mm(x.double(), transposed, offs=offs)


def test_one_that_was_pickled_is_one_graph_elsewhere(tmp_path: Path) -> None:
    """In bfloat16, where torch.compile has to be told of it, in a process that has made none; by threads at once."""
    torch.save(Experts4bit(torch.randn(2, 64, 64).bfloat16()), tmp_path / "experts.pt")
    code = """
import sys, threading, torch
import qlora_ext
from torch.nn import functional as F
found = []
def load():
    found.append(torch.load(sys.argv[1], weights_only=False))
threads = [threading.Thread(target=load) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
assert len(found) == 4
x, offs = torch.randn(3, 64).bfloat16(), torch.tensor([1, 3], dtype=torch.int32)
def product(x, offs):
    return F.grouped_mm(x, found[0].transpose(1, 2), offs=offs)
assert torch.equal(torch.compile(product, backend="eager", fullgraph=True)(x, offs), product(x, offs))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "experts.pt"], check=True)


def test_tangents_raise() -> None:
    experts = Experts4bit(torch.randn(2, 64, 64))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        x = torch.autograd.forward_ad.make_dual(torch.randn(3, 64), torch.ones(3, 64))
        with pytest.raises(RuntimeError, match=r"^Experts4bit: forward mode AD: expected tensors without tangents"):
            F.grouped_mm(x, experts.transpose(1, 2), offs=ends(1, 2))


def test_autocast_casts_x_as_for_a_float_weight() -> None:
    experts = Experts4bit(torch.randn(2, 64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.grouped_mm(torch.randn(3, 64), experts.transpose(1, 2), offs=ends(1, 2)).dtype == torch.bfloat16


def test_bad_weights_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"Experts4bit: weight: expected \[experts, rows, columns\], got \[4, 4\]"):
        Experts4bit(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"matrices of whole blocks of 64 elements, got 10 x 10"):
        Experts4bit(torch.randn(2, 10, 10))
    for wrong, error in (
        ({"blocksize": 0}, ValueError),
        ({"blocksize": "64"}, TypeError),
        ({"quant_type": 4}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(wrong))):
            Experts4bit(torch.randn(2, 64, 64), **wrong)
    experts = Experts4bit(torch.randn(2, 64, 64))
    with pytest.raises(ValueError, match=r"Experts4bit: weight: expected shape \[2, 64, 64\], got \[3, 64, 64\]"):
        experts.quantize_(torch.randn(3, 64, 64))


def test_experts_of_ones_own_carry_none() -> None:
    model = nn.Module()
    model.own = Experts4bit(torch.randn(2, 64, 64))
    model.layer = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"target_parameters: .*by their last parts: none\), got 'own'"):
        add_adapter(model, LoraConfig(target_parameters=["own"]))
    merge_adapter(model, dequantize=True)
    assert isinstance(model.own, Experts4bit)


class Fused(nn.Module):
    """Experts as transformers marks them."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = False
        self.config = SimpleNamespace(_experts_implementation="eager")
        self.up = nn.Parameter(torch.randn(2, 64, 64))
        self.codes = nn.Parameter(torch.zeros(2, 64, 64, dtype=torch.uint8), requires_grad=False)


def test_the_model_computes_by_grouped_mm() -> None:
    model = quantize_model(nn.Sequential(Fused()))
    assert model[0].config._experts_implementation == "grouped_mm"
    assert isinstance(model[0].codes, nn.Parameter)


def test_hooks_around_experts_stay() -> None:
    """They run around the forward, which goes on to be the module's own."""
    model = nn.Sequential(Fused())
    model[0].register_forward_hook(print)
    quantize_model(model)
    assert list(model[0]._forward_hooks.values()) == [print]


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 shards floating-point parameters only")
def test_sharded_experts_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(Fused())
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"quantize_model: model: 0\.up: expected a layer whose weight is whole"):
            quantize_model(model)
    finally:
        dist.destroy_process_group()
