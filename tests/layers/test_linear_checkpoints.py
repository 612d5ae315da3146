"""Linear4bit given checkpoints that its bytes alone do not explain: other quant_types, dtypes, other libraries'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from random_layers import state_bytes
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_ext import Linear4bit, merge_adapter, quantize_4bit, quantize_model
from qlora_ext.quant_type import quant_type_of

TYPES = ("nf4", "fp4")


def model_of(dtype: torch.dtype = torch.float32, **options: str) -> nn.Sequential:
    return quantize_model(nn.Sequential(nn.Linear(64, 64, dtype=dtype)), **options)


# --- another quant_type, whose bytes would fit ----------------------------------------------------------------------


def through_safetensors(saved: nn.Module, model: nn.Module, path: Path) -> None:
    save_model(saved, str(path))
    load_model(model, path)


def through_torch_save(saved: nn.Module, model: nn.Module, path: Path) -> None:
    torch.save(saved.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))


WAYS: dict[str, Callable[[nn.Module, nn.Module, Path], object]] = {
    "memory": lambda saved, model, _: model.load_state_dict(saved.state_dict()),
    "plain dict": lambda saved, model, _: model.load_state_dict(dict(saved.state_dict())),
    "torch.save": through_torch_save,
    "safetensors": through_safetensors,
}


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("way", WAYS)
def test_another_quant_type_is_refused(way: str, quant_type: str, tmp_path: Path) -> None:
    other = TYPES[1 - TYPES.index(quant_type)]
    saved, model = model_of(quant_type=quant_type), model_of(quant_type=quant_type)
    WAYS[way](saved, model, tmp_path / "model")
    assert state_bytes(model) == state_bytes(saved)
    model = model_of(quant_type=other)
    how = ", by its codes" if way in ("plain dict", "safetensors") else ""  # which have no metadata
    with pytest.raises(ValueError, match=rf"0\.weight: expected quant_type '{other}', got '{quant_type}'{how}$"):
        WAYS[way](saved, model, tmp_path / "model")


def rounded(weight: Tensor, levels: float = 7.5, size: int = 128) -> Tensor:
    """In groups, to the multiples of a scale that symmetric integers, as GPTQ's of 4 bits, stand for."""
    groups = weight.reshape(-1, size)
    scale = groups.abs().amax(1, keepdim=True) / levels
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


TOLD: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(128, 128),
    "uniform": lambda: torch.rand(128, 128) - 0.5,
    "heavy tails": lambda: torch.distributions.StudentT(3.0).sample((128, 128)),
    "half of it zero": lambda: torch.randn(128, 128) * (torch.rand(128, 128) > 0.5),
    "signs": lambda: torch.randn(64, 64).sign(),
    "two": lambda: torch.tensor([[1.0, -1.0]]),
}
UNTOLD: dict[str, Callable[[], Tensor]] = {
    "none": lambda: torch.zeros(0, 64),
    "on meta": lambda: torch.empty(64, 64, device="meta"),
}
PERHAPS: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(64, 64),
    "ternary": lambda: torch.randn(64, 64).round().clamp(-1, 1),
    "4 bits": lambda: rounded(torch.randn(256, 256)),
    "4 bits, uniform": lambda: rounded(torch.rand(512, 512) - 0.5, 7, 32),
    "4 bits, uniform, few": lambda: rounded(torch.rand(64, 64) - 0.5, 7, 32),
    "integers, heavy tails": lambda: (3 * torch.distributions.StudentT(3.0).sample((64, 64))).round().clamp(-8, 7),
    "integers, not around 0": lambda: (3 * torch.randn(64, 64) + 2).round().clamp(-8, 7),
}


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 1024])
def test_what_bytes_tell(blocksize: int, quant_type: str) -> None:
    def told(weight: Tensor) -> str | None:
        return quant_type_of(quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize)[0], blocksize)

    assert {name: told(make()) for name, make in TOLD.items()} == dict.fromkeys(TOLD, quant_type)
    assert {name: told(make()) for name, make in UNTOLD.items()} == dict.fromkeys(UNTOLD)
    for name, make in PERHAPS.items():
        assert told(make()) in (quant_type, None), name
    with FakeTensorMode():
        assert told(torch.empty(64, 64)) is None
    packed = quantize_4bit(torch.randn(128, 128), quant_type=quant_type, blocksize=blocksize)[0]
    with torch.device("meta"):  # where a model is made, not where its bytes are
        assert quant_type_of(packed, blocksize) == quant_type


@pytest.mark.parametrize(("lacking", "times"), [([8], 4), ([8, 12], 64)], ids=["few", "not all"])
def test_the_lack_of_a_code_may_be_chance(lacking: list[int], times: int) -> None:
    def told(lacking: list[int], times: int) -> str | None:
        codes = torch.tensor([code for code in range(16) if code not in lacking] * times, dtype=torch.uint8)
        return quant_type_of(codes[::2] << 4 | codes[1::2], 64)

    assert told([8], 64) == "fp4"
    assert told([8], 8) is None  # 8 of a code are too few
    assert told(lacking, times) is None


def test_no_subclass_is_looked_into() -> None:
    """A DTensor's bytes are on several devices."""

    class Sharded(Tensor):
        pass

    assert quant_type_of(quantize_4bit(torch.randn(64, 64))[0].as_subclass(Sharded), 64) is None


def test_negative_zeros_are_fp4s() -> None:
    packed = quantize_4bit(torch.randn(256, 256), quant_type="fp4")[0]
    high = packed >> 4
    assert (high == 0).any()
    assert quant_type_of(torch.where(high == 0, packed | 0x80, packed), 64) == "fp4"


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("blocksize", [64, 1024])
def test_negative_zeros_are_not_taken_for_nf4s(blocksize: int, zeros: int) -> None:
    """bitsandbytes writes code 8 for what rounds to zero from below. A few large values leave much to it."""
    weight = torch.randn(256, 256) * torch.where(torch.rand(256, 256) < 0.01, 50.0, 1.0)
    weight[:zeros] = 0
    packed = bitsandbytes.functional.quantize_4bit(weight, blocksize=blocksize, quant_type="fp4")[0].reshape(-1)
    assert (packed >> 4 == 8).any()
    assert quant_type_of(packed, blocksize) in ("fp4", None)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("absmax", [1e-39, 5e-39])
@pytest.mark.parametrize("shape", [(8, 64), (256, 256)], ids=str)
def test_a_row_of_subnormal_values_tells_nothing(shape: tuple[int, int], absmax: float, quant_type: str) -> None:
    for blocksize in (64, 256):
        weight = torch.randn(shape)
        weight[3:7] *= absmax / weight[3:7].abs().max()
        packed = quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize)[0]
        assert quant_type_of(packed, blocksize) in (quant_type, None)


# --- dtype ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("form", ["float", "packed", "packed, no metadata"])
def test_an_assigned_checkpoint_brings_its_dtype(form: str, device: str) -> None:
    """As nn.Linear's weight would; else a merged model has weights of one dtype and biases of another."""
    saved = nn.Sequential(nn.Linear(64, 64)).bfloat16() if form == "float" else model_of(torch.bfloat16)
    state = saved.state_dict()
    model = model_of().to(device)
    model.load_state_dict(dict(state) if form == "packed, no metadata" else state, assign=True)
    assert model[0].dtype == torch.bfloat16
    merge_adapter(model, dequantize=True)
    assert model(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["float", "packed"])
def test_a_copied_checkpoint_leaves_the_dtype(form: str) -> None:
    saved = nn.Sequential(nn.Linear(64, 64)).bfloat16() if form == "float" else model_of(torch.bfloat16)
    model = model_of()
    model.load_state_dict(saved.state_dict())
    assert (model[0].dtype, model[0].bias.dtype) == (torch.float32, torch.float32)


def test_without_a_word_on_it_the_dtype_stays() -> None:
    layer = Linear4bit(64, 64, bias=False, dtype=torch.float16)
    layer.load_state_dict(dict(Linear4bit(64, 64, bias=False).state_dict()), assign=True)
    assert layer.dtype == torch.float16
    layer.load_state_dict({"absmax": layer.absmax}, strict=False, assign=True)
    assert layer.dtype == torch.float16
    layer = Linear4bit(64, 64, dtype=torch.float16)
    layer.load_state_dict({"bias": torch.zeros(64)}, strict=False, assign=True)
    assert layer.dtype == torch.float16


# --- other libraries' -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_bitsandbytes_checkpoint_is_named(storage: torch.dtype) -> None:
    weight = torch.zeros(2048 // storage.itemsize, 1, dtype=storage)
    state = {"0.weight": weight, "0.weight.absmax": torch.zeros(64), "0.bias": torch.zeros(64)}
    with pytest.raises(
        ValueError, match=r"0\.weight: expected the original model's .* got a bitsandbytes checkpoint's"
    ):
        model_of().load_state_dict(state, strict=False)


def test_metadata_say_the_quant_type_before_the_bytes_do() -> None:
    saved = model_of(quant_type="fp4").state_dict()
    for metadata in saved._metadata.values():
        if "quant_type" in metadata:
            metadata["quant_type"] = "nf4"
    model_of(quant_type="nf4").load_state_dict(saved)
    saved = Linear4bit(8, 4, quant_type="fp4", blocksize=32).state_dict()  # of zeros, which are as good as -1 in NF4
    with pytest.raises(ValueError, match=r"expected quant_type 'nf4', got 'fp4'$"):
        Linear4bit(8, 4, quant_type="nf4", blocksize=32).load_state_dict(saved)
