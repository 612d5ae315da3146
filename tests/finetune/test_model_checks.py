"""Models that the examples, or adapters on a base of 4 bits, do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from finetune_command import arguments as arguments
from finetune_command import data as data
from finetune_command import model as model
from finetune_command import words
from tiny_model import one_thread as one_thread
from tiny_model import save_tiny_model, tiny_config, tiny_tokenizer
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

import qlora_ext
from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune.data import Dataset
from qlora_ext.finetune.encode import Example
from qlora_ext.finetune.evaluate import sample_answers
from qlora_ext.finetune.model_checks import check_fits, check_runs, position_limit
from qlora_ext.finetune.targets import target_modules

OPT = OPTConfig(
    **{"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "vocab_size": 258, "max_position_embeddings": 28},
)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_examples_beyond_the_tables_of_the_model_are_refused_before_the_earlier_run_is_discarded(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = arguments["output"] / "checkpoint-3"
    kept.mkdir(parents=True)
    save_tiny_model(tmp_path / "few words", vocab_size=200)
    assert cli.main(words({**arguments, "model": tmp_path / "few words", "overwrite": True})) == 2
    assert "below the 200 rows of LlamaForCausalLM's embedding, got 257" in capsys.readouterr().err
    opt = save(OPTForCausalLM(OPT), tmp_path / "opt")
    assert cli.main(words({**arguments, "model": opt, "overwrite": True})) == 2
    said = capsys.readouterr().err
    assert "--max-length: expected at most the 28 positions of OPTForCausalLM, got " in said
    assert kept.exists()
    assert cli.main(words({**arguments, "model": opt, "overwrite": True, "max-length": 28})) == 0


def test_the_longest_example_may_be_held_out() -> None:
    short, long = (Example(ids, ids, 1, "") for ids in ([1] * 28, [1] * 29))
    check_fits(OPTForCausalLM(OPT), Dataset([short], [short], 0, 0, 0), 0)
    with pytest.raises(ValueError, match="at most the 28 positions of OPTForCausalLM, got 29"):
        check_fits(OPTForCausalLM(OPT), Dataset([short], [long], 0, 0, 0), 0)


def of_tokens(*ids: int) -> Dataset:
    return Dataset([Example(list(ids), list(ids), 1, "")], [], 0, 0, 0)


def test_the_last_row_of_the_embedding_is_a_token_and_none_is_beyond_it() -> None:
    model = LlamaForCausalLM(tiny_config())
    check_fits(model, of_tokens(1, 257), 257)
    for tokens, pad in (((1, 258), 0), ((1, 2), 258)):
        with pytest.raises(ValueError, match="below the 258 rows of LlamaForCausalLM's embedding, got 258"):
            check_fits(model, of_tokens(*tokens), pad)


def test_a_model_is_tried_in_training() -> None:
    """Mamba reads more layers then."""
    model = LlamaForCausalLM(tiny_config())
    qlora_ext.quantize_model(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if model.training:
            torch.ones(1, 64) @ model.model.layers[0].mlp.up_proj.weight.float()
        return LlamaForCausalLM.forward(model, *args, **kwargs)

    model.forward = forward
    with pytest.raises(ValueError, match=r"perhaps one is read .*name it with --skip"):
        check_runs(model.eval())


@pytest.mark.parametrize("error", [AttributeError("of its own"), torch.OutOfMemoryError("no memory")], ids=str)
def test_an_error_that_is_of_no_layer_in_4_bits_stays_what_it_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model = LlamaForCausalLM(tiny_config())
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(type(error), match=str(error)):
        check_runs(model)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_was_tried_is_in_the_mode_it_was_in(training: bool) -> None:
    model = OPTForCausalLM(OPT).train(training)
    check_runs(model)
    assert model.training is training


def test_position_limit_is_of_models_with_a_table() -> None:
    assert position_limit(OPTForCausalLM(OPT)) == 28
    gptj = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 258, "n_positions": 48, "rotary_dim": 8}
    assert position_limit(GPTJForCausalLM(GPTJConfig(**gptj))) == 48
    assert position_limit(LlamaForCausalLM(tiny_config(max_position_embeddings=258))) is None


def test_a_longer_table_is_none_of_positions() -> None:
    model = LlamaForCausalLM(tiny_config(max_position_embeddings=64))
    model.of_each_layer = torch.nn.Embedding(1000, 8)  # as Gemma 3n's, of words
    assert position_limit(model) is None


def test_position_limit_is_that_of_the_config_of_the_text() -> None:
    model = OPTForCausalLM(OPT)
    text = model.config
    model.config = SimpleNamespace(get_text_config=lambda: text)
    assert position_limit(model) == 28


def test_sample_answer_ends_at_the_last_position() -> None:
    torch.manual_seed(0)
    prompt = list(range(40, 67))
    answers = sample_answers(OPTForCausalLM(OPT), tiny_tokenizer(), [Example(prompt, prompt, len(prompt), "")])
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("all-linear", "layers that are called, but backbone.layers.0.mixer.dt_proj is read"),
        ("in_proj", "expected layers in 4 bits that are called, but perhaps one is read"),
    ],
)
def test_layer_whose_weight_is_read_stays_as_it_is(
    targets: str, message: str, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=258, state_size=8)
    mamba = save(MambaForCausalLM(config), tmp_path / "mamba")
    command = {**arguments, "model": mamba, "target-modules": targets, "steps": 1, "samples": 1}
    assert cli.main(words(command)) == 2
    assert message in (said := capsys.readouterr().err)
    assert "--skip" in said.splitlines()[-1]
    assert cli.main(words({**command, "skip": "out_prj"})) == 2
    assert "--skip: expected names of linear layers or fused experts, got 'out_prj'" in capsys.readouterr().err
    assert cli.main(words({**command, "skip": "x_proj,dt_proj,out_proj"})) == 0
    report = json.loads((arguments["output"] / "report.json").read_text(encoding="utf-8"))
    assert report["arguments"]["skip"] == ["x_proj", "dt_proj", "out_proj"]
    peft.PeftModel.from_pretrained(MambaForCausalLM.from_pretrained(mamba), arguments["output"])


@pytest.mark.parametrize("targets", ["in_proj,out_proj", ".*_proj"])
def test_layers_that_peft_refuses_are_refused_before_training(
    targets: str, arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=258, state_size=8)
    mamba = save(MambaForCausalLM(config), tmp_path / "mamba")
    assert cli.main(words({**arguments, "model": mamba, "method": "lora", "target-modules": targets})) == 2
    expected = "error: --target-modules: expected layers that PEFT takes in a model of type mamba, got out_proj"
    assert expected in capsys.readouterr().err
    assert not arguments["output"].exists()
    assert target_modules("q_proj,out_proj", OPTForCausalLM(OPT)) == ["q_proj", "out_proj"], "in no other model"


@pytest.mark.parametrize("layer", ["out_proj", "conv1d"])
@pytest.mark.parametrize("kind", ["falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"])
def test_every_layer_that_peft_refuses_is_refused(kind: str, layer: str) -> None:
    model: Any = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("in_proj", layer)})
    model.config = SimpleNamespace(model_type=kind)
    with pytest.raises(ValueError, match=f"'{layer}' is incompatible with Mamba-based models"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[layer]), model)
    with pytest.raises(ValueError, match=f"in a model of type {kind}, got {layer}$"):
        target_modules(layer, model)
    assert target_modules("all-linear", model) == ["in_proj"]


@pytest.mark.parametrize("text", ["(", "q{99999999999}"])
def test_targets_that_are_no_expression_are_named(text: str) -> None:
    mamba = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=258, state_size=8))
    with pytest.raises(ValueError, match="--target-modules: expected a regular expression, got "):
        target_modules(text, mamba)
