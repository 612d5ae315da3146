"""load_adapter refuses what is not a whole LoRA adapter for this model, by name, and leaves the model as it was."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_model import everything, with_adapter
from random_layers import names_of
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM

from qlora_ext import LoraLinear, load_adapter, save_adapter
from qlora_ext.adapters.peft_config import read_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{Q_PROJ}.lora_A.weight", f"{PREFIX}{Q_PROJ}.lora_B.weight"
BASE = f"{PREFIX}{Q_PROJ}.base_layer.weight"
WIDE = torch.ones(4, 64)
BROKEN = f"{WEIGHTS}: expected a whole safetensors file, got"


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def change_config(**fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return change


def change_tensors(put: dict[str, Tensor], *, drop: tuple[str, ...] = ()) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS) | put
        save_file({key: tensor for key, tensor in tensors.items() if key not in drop}, folder / WEIGHTS)

    return change


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(folder / "touched")))


def only_q_proj_of_layer_0(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensors[key] for key in (A, B)}, folder / WEIGHTS)


def cut(length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


VARIANT = {"beta": 1e-4}
UNSUPPORTED = {
    "bias": "all",
    "use_dora": True,
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "target_parameters": ["q_proj.weight"],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "arrow_config": VARIANT,
    "use_bdlora": VARIANT,
    "kasa_config": VARIANT,
    "monteclora_config": VARIANT,
}
BAD: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no-config": (lambda folder: (folder / CONFIG).unlink(), FileNotFoundError, f"a folder with {CONFIG}"),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, f"{WEIGHTS}: .*got no file$"),
    "only-a-pickle": (only_a_pickle, FileNotFoundError, f"{WEIGHTS}: .*got only adapter_model.bin"),
    "config-empty": (lambda folder: (folder / CONFIG).write_text(""), ValueError, f"{CONFIG}.*JSON"),
    "config-half": (lambda folder: (folder / CONFIG).write_text('{"r": 4,'), ValueError, f"{CONFIG}.*JSON"),
    "config-binary": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x80"), ValueError, f"{CONFIG}.*JSON"),
    "config-deep": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), ValueError, f"{CONFIG}.*JSON"),
    "config-list": (lambda folder: (folder / CONFIG).write_text("[1]"), ValueError, f"{CONFIG}.*LORA.*list"),
    "peft-type": (change_config(peft_type="LOHA"), ValueError, f"{CONFIG}.*peft_type.*LORA.*LOHA"),
    "no-peft-type": (change_config(peft_type=None), ValueError, f"{CONFIG}.*peft_type.*LORA.*None"),
    "r": (change_config(r=0), ValueError, f"{CONFIG}.*r: expected.*0"),
    "rank-pattern": (change_config(rank_pattern=["q"]), ValueError, f"{CONFIG}.*rank_pattern.*'q'"),
    **{
        f"{key}-flag": (change_config(**{key: value}), ValueError, rf"{CONFIG}.*{key}.*\(\?i\)q")
        for key, value in {
            "rank_pattern": {"(?i)q": 4},
            "alpha_pattern": {"(?i)q": 4},
            "modules_to_save": ["(?i)q"],
            "layers_pattern": ["(?i)q"],
        }.items()
    },
    "weights-empty": (cut(0), ValueError, BROKEN),
    "weights-without-header": (cut(5), ValueError, BROKEN),
    "weights-in-header": (cut(100), ValueError, BROKEN),
    "weights-half": (cut(9000), ValueError, BROKEN),
    "weights-pickled": (
        lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(Evil(folder / "touched"))),
        ValueError,
        BROKEN,
    ),
    "weights-torch-save": (lambda folder: torch.save({A: torch.ones(4, 64)}, folder / WEIGHTS), ValueError, BROKEN),
    "weights-none": (lambda folder: save_file({}, folder / WEIGHTS), ValueError, f"{WEIGHTS}.*tensors, got none$"),
    "another-models-key": (change_tensors({"norm.weight": WIDE}), ValueError, f"{WEIGHTS}.*'norm.weight'"),
    "key-without-prefix": (
        change_tensors({f"{Q_PROJ}.lora_A.weight": WIDE}, drop=(A,)),
        ValueError,
        f"{WEIGHTS}.*'{Q_PROJ}.lora_A.weight'",
    ),
    "magnitude-vector": (
        change_tensors({f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(64)}),
        ValueError,
        f"{WEIGHTS}.*lora_magnitude_vector",
    ),
    "bias-of-b": (
        change_tensors({B.replace("weight", "bias"): torch.ones(64)}),
        ValueError,
        f"{WEIGHTS}.*keys.*{Q_PROJ}.lora_B.bias",
    ),
    **{
        f"base-{kind}": (change_tensors({BASE: tensor}), ValueError, f"{WEIGHTS}.*{BASE}: expected what the model has")
        for kind, tensor in {
            "of-another-shape": WIDE,
            "nan": torch.full((64, 64), torch.nan),
            "integers": torch.ones(64, 64, dtype=torch.int64),
        }.items()
    },
    "embedding": (
        change_tensors({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 258)}),
        ValueError,
        f"{WEIGHTS}.*lora_embedding_A",
    ),
    "unknown-layer": (change_tensors({A.replace("layers.0", "layers.7"): WIDE}), ValueError, f"{WEIGHTS}.*layers.7"),
    "layer-that-is-not-linear": (
        change_tensors({f"{PREFIX}model.norm.lora_A.weight": WIDE}),
        ValueError,
        f"{WEIGHTS}.*model.norm",
    ),
    "a-columns": (
        change_tensors({A: torch.ones(4, 65)}),
        ValueError,
        rf"{WEIGHTS}.*{Q_PROJ}.lora_A.*\[4, 64\].*\[4, 65\]",
    ),
    "a-rank": (change_tensors({A: WIDE[:1]}), ValueError, rf"{WEIGHTS}.*{Q_PROJ}.lora_A.*\[4, 64\].*\[1, 64\]"),
    "b-transposed": (change_tensors({B: WIDE}), ValueError, rf"{WEIGHTS}.*{Q_PROJ}.lora_B.*\[64, 4\].*\[4, 64\]"),
    "no-b": (change_tensors({}, drop=(B,)), ValueError, f"{WEIGHTS}.*{Q_PROJ}.lora_B.*no tensor"),
    "layer-without-tensors": (change_tensors({}, drop=(A, B)), ValueError, f"{WEIGHTS}.*{Q_PROJ}.* 1 of 14 layers"),
    "layers-without-tensors": (only_q_proj_of_layer_0, ValueError, f"{WEIGHTS}.*layers.0.*k_proj.* 13 of 14 layers"),
    "exclude-modules": (change_config(exclude_modules=5), ValueError, f"{CONFIG}.*exclude_modules.*5"),
    "exclude-modules-regex": (change_config(exclude_modules="("), ValueError, rf"{CONFIG}.*exclude_modules.*'\('"),
    "layers-to-transform": (
        change_config(layers_to_transform="all"),
        ValueError,
        f"{CONFIG}.*layers_to_transform.*'all'",
    ),
    "layers-pattern": (
        change_config(layers_to_transform=[0, 1], layers_pattern=["("]),
        ValueError,
        rf"{CONFIG}.*layers_pattern.*\(",
    ),
    "layers-pattern-group": (
        change_config(layers_to_transform=[0, 1], layers_pattern=["(?P<index>q)"]),
        ValueError,
        f"{CONFIG}.*layers_pattern.*index",
    ),
    "modules-to-save-comment": (
        change_config(modules_to_save="(?#"),
        ValueError,
        rf"{CONFIG}.*modules_to_save.*'\(\?#'",
    ),
    "modules-to-save": (change_config(modules_to_save="("), ValueError, rf"{CONFIG}.*modules_to_save.*'\('"),
    "modules-to-save-without-tensors": (
        change_config(modules_to_save=["norm"]),
        ValueError,
        f"{WEIGHTS}.*norm.*no tensor",
    ),
    "integers": (change_tensors({A: WIDE.long()}), ValueError, f"{WEIGHTS}.*{Q_PROJ}.lora_A.*int64"),
    **{key: (change_config(**{key: value}), ValueError, f"{CONFIG}.*{key}") for key, value in UNSUPPORTED.items()},
}


@pytest.mark.parametrize(
    ("targets", "demanded"),
    [
        (["q_proj"], [1]),
        (["q_proj", "model.layers.0.q_proj"], [0, 1]),
        (r".*q_proj", [0, 1]),
        (None, []),
    ],
    ids=["name", "whole-name", "regex", "none"],
)
def test_which_layers_are_demanded_with_layers_to_transform(targets: Any, demanded: list[int], tmp_path: Path) -> None:
    fields = {"peft_type": "LORA", "target_modules": targets, "layers_to_transform": [1]}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    _, _, demands = read_config(tmp_path)
    assert [i for i in range(2) if demands(f"model.layers.{i}.q_proj")] == demanded


@pytest.mark.parametrize(("name", "error"), [("keys", ValueError), ("a.b", ValueError), (1, TypeError)], ids=str)
def test_a_wrong_adapter_name_changes_nothing(name: Any, error: type[Exception], tmp_path: Path) -> None:
    save_adapter(with_adapter(r=4), tmp_path)
    model = with_adapter(r=4)
    before = everything(model)
    with pytest.raises(error, match=f"load_adapter: name: expected.*{name!r}"):
        load_adapter(model, tmp_path, name)
    assert everything(model) == before


@pytest.mark.parametrize("name", ["default", "new"], ids=["existing", "new"])
@pytest.mark.parametrize(("spoil", "error", "message"), BAD.values(), ids=BAD)
def test_a_bad_folder_is_refused_by_name_and_changes_nothing(
    spoil: Callable[[Path], object], error: type[Exception], message: str, name: str, tmp_path: Path
) -> None:
    save_adapter(with_adapter(r=4), tmp_path)
    spoil(tmp_path)
    model = with_adapter(r=4)
    before = everything(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path, name)
    assert everything(model) == before
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("got", ["org/adapter", "file", "empty"])
def test_what_is_no_folder_of_an_adapter_is_named(got: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    model = with_adapter()
    before = everything(model)
    expected = f"load_adapter: folder: expected a folder with {CONFIG} .*, got '{tmp_path / got}'"
    with pytest.raises(FileNotFoundError, match=expected):
        load_adapter(model, tmp_path / got)
    assert everything(model) == before


@pytest.mark.parametrize("fields", [{"r": 1}, {"r": 8}, {"target_modules": ["q_proj"]}], ids=str)
def test_an_adapter_of_another_size_does_not_fit_an_existing_one(fields: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 would even broadcast."""
    for saved, existing in permutations([{"r": 4}, {"r": 4} | fields]):
        save_adapter(with_adapter(**saved), tmp_path)
        model = with_adapter(**existing)
        before = everything(model)
        with pytest.raises(ValueError, match=r"load_adapter.*'default'"):
            load_adapter(model, tmp_path)
        assert everything(model) == before


def test_an_adapter_of_another_model_does_not_fit(tmp_path: Path) -> None:
    save_adapter(with_adapter(), tmp_path)
    model = LlamaForCausalLM(tiny_config(hidden_size=32))
    before = everything(model)
    with pytest.raises(ValueError, match=rf"load_adapter.*{WEIGHTS}.*proj.*expected shape.*got"):
        load_adapter(model, tmp_path)
    assert everything(model) == before
    assert not names_of(model, LoraLinear)


@pytest.mark.parametrize("targets", [None, ["nothing"]], ids=str)
def test_modules_without_any_adapter_are_no_adapter(targets: Any, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 8, "target_modules": targets, "modules_to_save": ["lm_head"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=False))
    save_file({f"{PREFIX}lm_head.weight": torch.zeros_like(model.lm_head.weight)}, tmp_path / WEIGHTS)
    before = everything(model)
    with pytest.raises(ValueError, match=r"load_adapter: .* expected lora_A and lora_B tensors, got none"):
        load_adapter(model, tmp_path)
    assert everything(model) == before


def test_a_base_on_meta_is_not_what_a_file_has(tmp_path: Path) -> None:
    model = with_adapter()
    save_adapter(model, tmp_path)
    weight = model.get_submodule(Q_PROJ).base_layer.weight
    save_file(load_file(tmp_path / WEIGHTS) | {BASE: weight.detach().clone()}, tmp_path / WEIGHTS)
    load_adapter(model, tmp_path)
    save_file(
        load_file(tmp_path / WEIGHTS) | {BASE: torch.full((64, 64), 1e300, dtype=torch.float64)}, tmp_path / WEIGHTS
    )
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.weight: expected what the model has in this place"):
        load_adapter(model, tmp_path)
    model.get_submodule(Q_PROJ).base_layer.to("meta")
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.weight: expected what the model has in this place"):
        load_adapter(model, tmp_path)
