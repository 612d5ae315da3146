"""Linear4bit's tensors on the move: state_dict, loading a float weight, casts, devices, copies."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, pairwise
from random_layers import make_linear, make_lora, state_bytes
from reference import assert_same
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from qlora_ext import Linear4bit, LoraConfig

State = dict[str, Tensor]
WEIGHT = ("weight", "absmax", "nested_absmax", "nested_offset")
by_layout = pytest.mark.parametrize("in_features", [256, 100], ids=["rows", "flat"])
by_double_quant = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])


def through_safetensors(state: State, folder: Path) -> State:
    save_file(state, folder / "layer.safetensors")
    return load_file(folder / "layer.safetensors")


def through_torch_save(state: State, folder: Path) -> State:
    torch.save(state, folder / "layer.pt")
    return torch.load(folder / "layer.pt", weights_only=True)


WAYS = {"memory": lambda state, folder: state, "safetensors": through_safetensors, "torch.save": through_torch_save}


@pytest.mark.parametrize(
    ("way", "in_features", "double_quant", "device", "assign"),
    [
        row
        for row in pairwise(WAYS, (256, 100), (False, True), ("cpu", "meta"), (False, True))
        if row[3:] != ("meta", False)  # torch copies nothing into meta tensors: they must be assigned
    ],
)
def test_state_dict_round_trip(
    way: str, in_features: int, double_quant: bool, device: str, assign: bool, tmp_path: Path
) -> None:
    layer = make_linear(in_features, double_quant=double_quant)
    other = Linear4bit(in_features, 48, double_quant=double_quant, device=device)
    other.load_state_dict(WAYS[way](layer.state_dict(), tmp_path), strict=True, assign=assign)
    assert state_bytes(other) == state_bytes(layer)
    assert not other.weight.requires_grad
    assert not other.absmax.requires_grad
    x = torch.randn(3, in_features)
    assert_same(other(x), layer(x))


def test_state_dict_after_an_eval_forward_is_the_same() -> None:
    """bitsandbytes repacks in eval mode, and then saves that."""
    layer = make_linear(dtype=torch.bfloat16).eval()
    before = state_bytes(layer)
    with torch.no_grad():
        layer(torch.randn(1, 256, dtype=torch.bfloat16))
    assert state_bytes(layer) == before


# --- a float weight -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A larger model with a Linear4bit in it."""

    def __init__(self, in_features: int = 256, **options: Any) -> None:
        super().__init__()
        self.proj = Linear4bit(in_features, 48, **options)
        self.norm = nn.LayerNorm(48, device=options.get("device"))


def float_state(in_features: int = 256, dtype: torch.dtype = torch.float32) -> State:
    parts = OrderedDict(proj=nn.Linear(in_features, 48, dtype=dtype), norm=nn.LayerNorm(48))
    return nn.Sequential(parts).state_dict()


@pytest.mark.parametrize(
    ("dtype_name", "in_features", "double_quant", "device", "assign"),
    [
        row
        for row in pairwise(DTYPES, (256, 100), (False, True), ("cpu", "meta"), (False, True))
        if row[3:] != ("meta", False)
    ],
)
def test_loading_a_float_weight_quantizes_it(
    dtype_name: str, in_features: int, double_quant: bool, device: str, assign: bool
) -> None:
    dtype = DTYPES[dtype_name]
    state = float_state(in_features, dtype)
    given = dict(state)
    model = Block(in_features, double_quant=double_quant, dtype=dtype, device=device)
    model.load_state_dict(state, strict=True, assign=assign)

    linear = nn.Linear(in_features, 48, dtype=dtype)
    linear.load_state_dict({"weight": state["proj.weight"], "bias": state["proj.bias"]})
    assert state_bytes(model.proj) == state_bytes(Linear4bit.from_linear(linear, double_quant=double_quant))
    assert {name: p.requires_grad for name, p in model.proj.named_parameters()} == {
        "weight": False,
        "absmax": False,
        "bias": True,
    }
    assert state == given  # the caller's dict is left as it is


def test_loading_a_float_weight_alone_leaves_the_bias() -> None:
    model = Block()
    nn.init.normal_(model.proj.bias)
    bias = model.proj.bias.detach().clone()
    report = model.load_state_dict({"proj.weight": torch.randn(48, 256)}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["proj.bias", "norm.weight", "norm.bias"], [])
    assert model.proj.dequantize().any()
    assert_same(model.proj.bias.detach(), bias)


def test_loading_tensors_one_by_one_fills_a_model_on_meta() -> None:
    """How a checkpoint streams in."""
    model = Block(device="meta")
    for name, tensor in float_state().items():
        model.load_state_dict({name: tensor}, strict=False, assign=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert model.norm(model.proj(torch.randn(3, 256))).isfinite().all()


def test_loading_a_float_weight_reports_unexpected_keys() -> None:
    model = Block(bias=False)
    report = model.load_state_dict(float_state() | {"proj.extra": torch.ones(1)}, strict=False)
    assert (report.missing_keys, set(report.unexpected_keys)) == ([], {"proj.bias", "proj.extra"})


@by_double_quant
def test_packed_weight_without_its_scales_is_reported(double_quant: bool) -> None:
    layer = make_linear(bias=False, double_quant=double_quant)
    scales = set(layer.state_dict()) - {"weight"}
    report = make_linear(bias=False, double_quant=double_quant).load_state_dict({"weight": layer.weight}, strict=False)
    assert set(report.missing_keys) == scales


SINGLE, DOUBLE = make_linear(double_quant=False).state_dict(), make_linear().state_dict()
BAD = {
    "weight-int8": (False, {"weight": SINGLE["weight"].view(torch.int8)}, TypeError, "uint8.*int8"),
    "weight-bool": (False, {"weight": SINGLE["weight"].bool()}, TypeError, "uint8.*bool"),
    "absmax-half": (False, {"absmax": SINGLE["absmax"].half()}, TypeError, "float32.*float16"),
    "absmax-codes": (False, {"absmax": DOUBLE["absmax"]}, TypeError, "float32.*uint8"),
    "absmax-no-codes": (True, {"absmax": SINGLE["absmax"]}, TypeError, "uint8.*float32"),
    "nested-absmax-half": (True, {"nested_absmax": DOUBLE["nested_absmax"].half()}, TypeError, "float32.*float16"),
    "nested-offset-half": (True, {"nested_offset": DOUBLE["nested_offset"].half()}, TypeError, "float32.*float16"),
    "weight-rows": (False, {"weight": SINGLE["weight"][1:]}, ValueError, r"\[48, 128\].*\[47, 128\]"),
    "weight-flat": (False, {"weight": SINGLE["weight"].view(-1)}, ValueError, r"\[48, 128\].*\[6144\]"),
    "absmax-blocks": (False, {"absmax": SINGLE["absmax"][:, 1:]}, ValueError, r"\[48, 4\].*\[48, 3\]"),
    "nested-absmax-groups": (True, {"nested_absmax": torch.ones(2)}, ValueError, r"\[1\].*\[2\]"),
    "nested-offset-1d": (True, {"nested_offset": torch.ones(1)}, ValueError, r"\[\].*\[1\]"),
    "float-weight-shape": (True, {"weight": torch.ones(256, 48)}, ValueError, r"\[48, 256\].*\[256, 48\]"),
    "float-weight-dtype": (True, {"weight": torch.ones(48, 256).double()}, TypeError, "Double"),
    "float-weight-nan": (True, {"weight": torch.full((48, 256), torch.nan)}, ValueError, "finite"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("double_quant", "wrong", "error", "message"), BAD.values(), ids=BAD)
def test_loading_what_does_not_fit(
    double_quant: bool, wrong: State, error: type[Exception], message: str, assign: bool
) -> None:
    """torch alone would cast, or broadcast a 0-d tensor. The error names the tensor, and the layer is as it was."""
    model = nn.ModuleDict({"proj": make_linear(double_quant=double_quant)})
    before = state_bytes(model)
    state = model.state_dict() | {f"proj.{name}": tensor for name, tensor in wrong.items()}
    named = rf"^Linear4bit: proj\.{next(iter(wrong))}: (quantize_4bit: weight: )?expected"
    with pytest.raises(error, match=rf"{named}.*{message}"):
        model.load_state_dict(state, assign=assign)
    assert state_bytes(model) == before


# --- casts, devices, copies -----------------------------------------------------------------------------------------

CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda layer: layer.half(), torch.float16),
    "bfloat16": (lambda layer: layer.bfloat16(), torch.bfloat16),
    "to-bfloat16": (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
    "to-device-and-half": (lambda layer: layer.to("cpu", torch.float16), torch.float16),
    "half-and-back": (lambda layer: layer.half().float(), torch.float32),
}


@by_layout
@by_double_quant
@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
def test_a_cast_changes_dtype_and_bias_alone(
    cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype, double_quant: bool, in_features: int
) -> None:
    layer = make_linear(in_features, double_quant=double_quant)
    before = state_bytes(layer)
    assert cast(nn.Sequential(layer))[0] is layer
    after = state_bytes(layer)
    assert {name: after[name] for name in after if name != "bias"} == {
        name: before[name] for name in before if name != "bias"
    }
    assert (layer.dtype, layer.bias.dtype, layer.dequantize().dtype) == (dtype, dtype, dtype)
    assert layer(torch.randn(3, in_features, dtype=dtype)).isfinite().all()


@by_layout
@by_double_quant
def test_to_meta_and_back_with_to_empty(double_quant: bool, in_features: int) -> None:
    layer = make_linear(in_features, double_quant=double_quant)
    state, before = layer.state_dict(), state_bytes(layer)
    layer.to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu")
    layer.load_state_dict(state, strict=True)
    assert state_bytes(layer) == before
    assert layer.dtype == torch.float32


def test_forward_on_meta_gives_the_shape() -> None:
    y = make_linear(dtype=torch.bfloat16).to("meta")(torch.empty(2, 3, 256, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 48), torch.bfloat16, "meta")


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@by_layout
@by_double_quant
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_independent(
    copied: Callable[[nn.Module], Linear4bit], double_quant: bool, in_features: int
) -> None:
    layer = make_linear(in_features, dtype=torch.bfloat16, double_quant=double_quant)
    other = copied(layer)
    assert repr(other) == repr(layer)
    assert other.dtype == layer.dtype
    assert state_bytes(other) == state_bytes(layer)
    before = state_bytes(layer)
    other.quantize_(torch.randn(48, in_features))
    nn.init.normal_(other.bias)
    assert state_bytes(layer) == before


@by_layout
@by_double_quant
def test_state_names_the_layers_own_tensors(double_quant: bool, in_features: int) -> None:
    layer = make_linear(in_features, double_quant=double_quant)
    state = layer.state
    assert (state.shape, state.dtype, state.quant_type, state.blocksize) == (
        (48, in_features),
        torch.float32,
        "nf4",
        64,
    )
    for name in WEIGHT[1:]:
        assert getattr(state, name) is getattr(layer, name)


def test_tensors_that_are_plain_attributes() -> None:
    """As FSDP and parametrizations leave them while the layer computes."""
    layer, adapted = make_linear(128), make_lora(make_linear(128), LoraConfig())
    x = torch.randn(3, 128)
    expected = [layer(x), adapted(x), layer.dequantize()]
    for module, names in {
        layer: WEIGHT,
        adapted.base_layer: ("weight", "absmax"),
        adapted.lora_A: ("a0",),
        adapted.lora_B: ("a0",),
    }.items():
        for name in names:
            tensor = getattr(module, name).detach()
            delattr(module, name)
            setattr(module, name, tensor)
    assert_same([layer(x), adapted(x), layer.dequantize()], expected)


def test_codes_are_not_pruned() -> None:
    layer = make_linear(64)
    prune.l1_unstructured(layer, "weight", 0.2)
    with pytest.raises(TypeError, match=r"Linear4bit: weight: expected codes, got those that torch\.nn\.utils\.prune"):
        layer(torch.ones(64))
