"""Damaged folders of models: each damage is one ValueError that names file and tensor, before a tensor is loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import assert_same
from safetensors.torch import load_file, save_file
from tiny_model import one_thread as one_thread
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_ext import quantize_model
from qlora_ext.interop import bitsandbytes as folders
from qlora_ext.interop import checkpoint_files

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER = "model.layers.0.mlp.up_proj.weight"
STATE = f"{LAYER}.quant_state.bitsandbytes__nf4"
Header = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, in float32: no other float has as many bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("whole") / "model"
    model = quantize_model(LlamaForCausalLM(config))
    folders.save_folder(model, folder)
    folders.save_folder(model, folder.with_name("sharded"), max_shard_size="10KB")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.with_name("sharded"), tmp_path / "sharded"))


def refused(folder: Path, expected: str) -> None:
    """Exactly one error, that starts so; nothing but files is looked at before."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        folders.load_folder(folder)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(f"bitsandbytes.load_folder: {expected}"), caught.value
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def edit_header(folder: Path, change: Callable[[Header], Any]) -> None:
    """Change the header alone; what change returns is written in its place."""
    data = (folder / FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def test_the_whole_one_loads(whole: Path) -> None:
    model, other = folders.load_folder(whole), folders.load_folder(whole.with_name("sharded"))
    for name, tensor in model.state_dict().items():
        assert_same(other.state_dict()[name], tensor)


@pytest.mark.parametrize("left", [0, 7, 8, 500, -1])
def test_a_truncated_file(folder: Path, left: int) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:left])
    refused(folder, f"{FILE}: ")


def test_a_truncated_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, f"{path.name}: ")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001])
def test_a_header_that_claims_to_be_long(folder: Path, length: int) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(folder, f"{FILE}: expected a header of at most {len(data) - 8} bytes, got {length}")


def offsets(begin: int, end: int) -> Callable[[Header], None]:
    return lambda header: header[LAYER].update(data_offsets=[begin, end])


def entry(**changes: Any) -> Callable[[Header], None]:
    return lambda header: header[LAYER].update(changes)


HEADERS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "no JSON": (lambda _: b"{" + b"a" * 100, "expected a header in JSON, got: "),
    "not UTF-8": (lambda _: b'{"\xff": 1}', "expected a header in JSON, got: "),
    "deep": (lambda _: b"[" * 100_000, "expected a header in JSON, got: "),
    "a list": (lambda _: b"[]", "expected a header of tensors, got []"),
    "no entry": (lambda h: h.update({LAYER: 3}), f"{LAYER}: expected a printable name, and dtype, shape, "),
    "a name of newlines": (lambda h: h.update({"\n": 3}), r"'\n': expected a printable name, and dtype, "),
    "metadata": (lambda h: h.update(__metadata__=3), "expected a header of tensors, got {"),
    "beyond": (offsets(0, 10**9), f"{LAYER}: data_offsets: expected two within "),
    "huge": (offsets(2**70, 2**70 + 4096), f"{LAYER}: data_offsets: expected two within "),
    "negative": (offsets(-4096, 0), f"{LAYER}: data_offsets: expected two within "),
    "reversed": (offsets(4096, 0), f"{LAYER}: data_offsets: expected two within "),
    "overlapping": (offsets(64, 64 + 4096), ""),
    "dtype": (entry(dtype="F4"), f"{LAYER}: dtype: expected one that torch has, got 'F4'"),
    "dtype of another kind": (entry(dtype=[1]), f"{LAYER}: dtype: expected one that torch has, got [1]"),
    "wider dtype": (entry(dtype="F32"), f"{LAYER}: expected 16384 bytes, by dtype and shape, got ["),
    "negative shape": (entry(shape=[-4096, -1]), f"{LAYER}: shape: expected a list of sizes, got [-4096, -1]"),
    "huge shape": (
        entry(shape=[2**62] * 60),
        f"{LAYER}: expected 6785531485608273838101787129464910459482125125085955804990607943845696514036",
    ),
    "a thousand dimensions": (entry(shape=[1] * 1000), f"{LAYER}: shape: expected a list of sizes, got ["),
    "a hole": (lambda h: h.pop(LAYER) and None, ""),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_header(folder: Path, damage: str) -> None:
    change, expected = HEADERS[damage]
    edit_header(folder, change)
    refused(folder, f"{FILE}: {expected}")


def missing(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


NORM = "model.norm.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    **{
        f"no {key}": (missing(f"{LAYER}.{key}"), f"{LAYER}.{key}: expected it beside {STATE}, got none")
        for key in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    },
    "no bytes": (missing(LAYER), f"{LAYER}: expected it beside {STATE}, got none"),
    "no state": (missing(STATE), f"{LAYER}"),
    "no state at all": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "quant_state" in name],
        "expected tensors named *.weight.quant_state.bitsandbytes__nf4 or fp4, got none",
    ),
    "no dense weight": (missing(NORM), f"{NORM}: expected it in the folder's files, got none"),
    "shape of bytes": (put(LAYER, torch.flatten), f"{LAYER}: expected 4096 bytes as uint8 or floats [n, 1], got "),
    "fewer bytes": (put(LAYER, lambda t: t[:-1]), f"{LAYER}: expected 4096 bytes as uint8 or floats [n, 1], got "),
    "integers": (
        put(LAYER, lambda t: t.view(torch.int8)),
        f"{LAYER}: expected 4096 bytes as uint8 or floats [n, 1], got torch.int8 [4096, 1]",
    ),
    "absmax of floats": (
        put(f"{LAYER}.absmax", torch.Tensor.float),
        f"{LAYER}.absmax: expected torch.uint8 [128], got torch.float32 [128]",
    ),
    "fewer absmax": (
        put(f"{LAYER}.absmax", lambda t: t[:-1]),
        f"{LAYER}.absmax: expected torch.uint8 [128], got torch.uint8 [127]",
    ),
    "nested_absmax": (
        put(f"{LAYER}.nested_absmax", lambda t: t.repeat(2)),
        f"{LAYER}.nested_absmax: expected torch.float32 [1], got torch.float32 [2]",
    ),
    "another table": (
        put(f"{LAYER}.quant_map", lambda t: t + 2e-6),
        f"{LAYER}.quant_map: expected the values of nf4, got others",
    ),
    "NaN in the table": (
        put(f"{LAYER}.quant_map", lambda t: t * float("nan")),
        f"{LAYER}.quant_map: expected the values of nf4, got others",
    ),
    "another nested table": (
        put(f"{LAYER}.nested_quant_map", lambda t: t.flip(0)),
        f"{LAYER}.nested_quant_map: expected the values of dynamic, got others",
    ),
    "two states": (
        lambda tensors: tensors.update({STATE.replace("nf4", "fp4"): tensors[STATE].clone()}),
        f"{STATE.replace('nf4', 'fp4')}: quant_type: expected 'fp4', got 'nf4'",
    ),
    "one tensor more": (
        lambda tensors: tensors.update({f"{LAYER}.scale": torch.zeros(1)}),
        f"{LAYER}.scale: expected only absmax, nested_absmax, nested_quant_map, quant_map beside the weight, got this",
    ),
    "the state of one layer twice": (
        lambda tensors: tensors.update({STATE.removeprefix("model."): tensors[STATE].clone()}),
        f"{STATE}: expected one state of a layer, got {STATE.removeprefix('model.')} as well",
    ),
    "of parametrized experts": (
        lambda tensors: tensors.update({"e.gate_up_proj.quant_state.bitsandbytes__nf4": tensors[STATE].clone()}),
        "e.gate_up_proj.quant_state.bitsandbytes__nf4: expected the state of a layer's weight in nf4 or fp4",
    ),
    "of no layer": (
        lambda tensors: tensors.update({"a.weight.quant_state.bitsandbytes__nf4": tensors[STATE].clone()}),
        "a.weight.quant_state.bitsandbytes__nf4: expected a linear layer in the model, got none at a.weight",
    ),
    "dense shape": (put(NORM, lambda t: t[:-1]), f"{NORM}: expected floats [64], got torch.float32 [63]"),
    "dense integers": (put(NORM, torch.Tensor.int), f"{NORM}: expected floats [64], got torch.int32 [64]"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_a_tensor_that_cannot_be(folder: Path, damage: str) -> None:
    change, expected = TENSORS[damage]
    edit_tensors(folder, change)
    refused(folder, f"{FILE}: {expected}")


STATES: dict[str, tuple[Any, str]] = {
    "huge shape": ({"shape": [2**62, 2**62]}, "shape: expected [128, 64], got [4611686018427387904, "),
    "larger shape": ({"shape": [2**70, 64]}, "shape: expected [out, in], got ["),
    "swapped shape": ({"shape": [64, 128]}, "shape: expected [128, 64], got [64, 128]"),
    "no shape": ({"shape": None}, "shape: expected [out, in], got None"),
    "three dimensions": ({"shape": [2, 64, 64]}, "shape: expected [out, in], got [2, 64, 64]"),
    "blocksize 0": ({"blocksize": 0}, "blocksize: expected a power of two from 32 to 4096, got 0"),
    "blocksize 2**70": ({"blocksize": 2**70}, "blocksize: expected a power of two from 32 to 4096, got 1180591620"),
    "blocksize true": ({"blocksize": True}, "blocksize: expected a power of two from 32 to 4096, got True"),
    "another blocksize": ({"blocksize": 128}, "expected {'quant_type': 'nf4', 'blocksize': 64, "),
    "quant_type": ({"quant_type": "int4"}, "quant_type: expected 'nf4', got 'int4'"),
    "dtype": ({"dtype": "float64"}, "dtype: expected one of float32, float16, bfloat16, got 'float64'"),
    "dtype of another kind": ({"dtype": ["float32"]}, "dtype: expected one of float32, float16, bfloat16, got ['fl"),
    "nested_blocksize": ({"nested_blocksize": 128}, "nested_blocksize: expected 256, got 128"),
    "nested_dtype": ({"nested_dtype": "float16"}, "nested_dtype: expected 'float32', got 'float16'"),
    "nested_offset": ({"nested_offset": float("nan")}, "nested_offset: expected a finite float32, got nan"),
    "large nested_offset": ({"nested_offset": 1e39}, "nested_offset: expected a finite float32, got 1e+39"),
    "nested_offset of another kind": ({"nested_offset": "1"}, "nested_offset: expected a finite float32, got '1'"),
    "one key more": ({"more": 1}, "expected an object of quant_type, blocksize, dtype, shape, nested_blocksize, "),
    "not UTF-8": (b'{"\xff": 1}', "expected JSON, got: "),
    "no JSON": (b"{", "expected JSON, got: "),
    "a list": (b"[]", "expected an object of quant_type, blocksize, dtype, shape, got []"),
    "empty": (b"", "expected JSON, got: "),
    "deep": (b"[" * 4000, "expected JSON, got: "),
    "long": (b" " * 5000, "expected uint8 [at most 4096], got torch.uint8 [5000]"),
    "a long number": (b'{"blocksize": ' + b"1" * 4050 + b"}", "expected an object of quant_type, blocksize, "),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_state_that_cannot_be(folder: Path, damage: str) -> None:
    change, expected = STATES[damage]

    def edit(tensors: dict[str, Tensor]) -> None:
        content = json.loads(bytes(tensors[STATE].tolist()))
        text = change if isinstance(change, bytes) else json.dumps(content | change).encode()
        tensors[STATE] = torch.tensor(list(text), dtype=torch.uint8)

    edit_tensors(folder, edit)
    refused(folder, f"{FILE}: {STATE}: {expected}")


def test_a_nested_key_missing_in_the_state(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        content = json.loads(bytes(tensors[STATE].tolist()))
        del content["nested_offset"]
        tensors[STATE] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    edit_tensors(folder, edit)
    refused(folder, f"{FILE}: {STATE}: expected an object of quant_type, blocksize, dtype, shape, nested_blocksize, ")


@pytest.mark.parametrize("name", [FILE, "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "directory"])
def test_another_kind_of_file(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink()
    make(folder / name)
    refused(folder, f"{name}: expected a regular file, got another kind")


def test_no_weights_or_pickled_ones(folder: Path, tmp_path: Path) -> None:
    (folder / FILE).unlink()
    refused(folder, f"{folder}: expected {FILE} or {INDEX}, got none")
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, f"{folder}: expected {FILE} or {INDEX}, got only pytorch_model.bin, a pickle, which is not read")
    refused(tmp_path / "none", f"{tmp_path / 'none'}: expected a folder, got none")
    refused(folder / "config.json", f"{folder / 'config.json'}: expected a folder, got a file")


INDICES: dict[str, tuple[Any, str]] = {
    "outside": ("../model.safetensors", f"{INDEX}: weight_map: expected safetensors files beside it, got '../model"),
    "absolute": ("/etc/a.safetensors", f"{INDEX}: weight_map: expected safetensors files beside it, got '/etc/a."),
    "a pickle": ("model.bin", f"{INDEX}: weight_map: expected safetensors files beside it, got 'model.bin'"),
    "NUL": ("a\0.safetensors", f"{INDEX}: weight_map: expected safetensors files beside it, got 'a\\x00.s"),
    "not there": ("a.safetensors", "a.safetensors: expected a regular file, got none"),
    "a number": (3, f"{INDEX}: weight_map: expected the name of a file for each tensor, got {{"),
}


@pytest.mark.parametrize("damage", INDICES)
def test_an_index_that_leads_astray(sharded: Path, damage: str) -> None:
    name, expected = INDICES[damage]
    shutil.copy(sorted(sharded.glob("*.safetensors"))[0], sharded.parent / FILE)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({LAYER: name}))
    refused(sharded, expected)


def test_a_shard_that_the_index_lacks(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    there = load_file(first)

    def edit(index: Any) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != first.name}

    edit_json(sharded / INDEX, edit)
    with pytest.raises(ValueError, match=r"expected it .*, got none$") as caught:
        folders.load_folder(sharded)
    assert any(f": {name}: " in str(caught.value) for name in there)


def test_an_index_that_is_none_or_wrong(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update(none=first.name))
    refused(sharded, f"{first.name}: 'none': expected it there, as {INDEX} says, got none")
    edit_json(sharded / INDEX, lambda index: index.update(weight_map={}))
    refused(sharded, f"{INDEX}: weight_map: expected the name of a file for each tensor, got {{}}")
    (sharded / INDEX).write_bytes(b"[" * 100_000)
    refused(sharded, f"{INDEX}: expected JSON, got: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("quantization_config") and None, "quantization_config: expected bitsandbytes with load_in_4"),
        (lambda c: c["quantization_config"].update(load_in_4bit=False), "quantization_config: expected bitsandbytes"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "quantization_config: expected bitsandbytes"),
        (lambda c: c.update(quantization_config=[1]), "quantization_config: expected bitsandbytes with load_in_4bit"),
        (lambda c: c.update(model_type="none"), "expected a model that transformers can make of it, got: "),
        (lambda c: c.update(hidden_size="many"), "expected a model that transformers can make of it, got: "),
        (lambda _: [], "expected a JSON object, got []"),
    ],
)
def test_a_config_of_another_kind(folder: Path, change: Callable[[Any], Any], expected: str) -> None:
    edit_json(folder / "config.json", change)
    refused(folder, f"config.json: {expected}")


def test_mutated_headers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes changed, files cut off, other lengths: the same values or one error, and never a larger buffer."""
    whole, expected = (folder / FILE).read_bytes(), folders.load_folder(folder).state_dict()
    end = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    fromfile = np.fromfile

    def read(path: Path, dtype: type, count: int, **where: int) -> Any:
        assert 0 <= count <= len(whole)
        return fromfile(path, dtype, count, **where)

    monkeypatch.setattr(checkpoint_files.np, "fromfile", read)
    errors, loaded = [], 0
    for number in range(2000):
        data = bytearray(whole)
        if number % 4 == 0:
            del data[chance.randrange(end) :]
        elif number % 4 == 1:
            data[:8] = chance.choice([chance.randrange(2 * end), chance.getrandbits(64)]).to_bytes(8, "little")
        else:
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(8, end)] = (
                    chance.choice(b'0123456789"[]{}:,. _aFU') if number % 2 else chance.randrange(256)
                )
        (folder / FILE).write_bytes(data)
        try:
            tracemalloc.start()
            try:
                checkpoint_files.read_folder(folder)
            finally:
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                assert peak < 20 * len(whole)
            state = folders.load_folder(folder).state_dict()
        except ValueError as error:
            errors.append(error)
        else:
            loaded += 1
            assert state.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(state[name], tensor), (number, name)
    assert all(type(error) is ValueError and FILE in str(error) for error in errors)
    assert len(errors) > 1500
    assert loaded
