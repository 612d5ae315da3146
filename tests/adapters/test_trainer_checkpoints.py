"""transformers.Trainer over a model in 4 bits, with checkpoints that hold the adapter alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from random_layers import randomize_adapters, state_bytes
from reference import assert_same
from tiny_model import one_thread as one_thread
from tiny_model import tiny_config, tiny_tokenizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    DataCollatorWithPadding,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from qlora_ext import LoraConfig, PagedAdamW, add_adapter, delete_adapter, load_adapter, quantize_model, set_adapter
from qlora_ext.adapters.trainer_checkpoints import AdapterCheckpoints
from qlora_ext.model_layers import lora_layers

STEPS, SAVED = 6, 3
TOKENS = torch.randint(258, (14, 12), generator=torch.Generator())


class AdapterTrainer(AdapterCheckpoints, Trainer):
    pass


def quantized(kind: type[Any] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return quantize_model(kind(tiny_config(pad_token_id=0)))


def trainer(folder: Path, model: nn.Module, **options: Any) -> AdapterTrainer:
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=SAVED,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    is_classifier = isinstance(model, LlamaForSequenceClassification)
    data = [{"input_ids": ids, "labels": ids[0] % 2 if is_classifier else ids} for ids in TOKENS]
    return AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=(PagedAdamW, {"lr": arguments.learning_rate, "state_bits": 8}),
    )


def with_frozen_a(model: Any) -> Any:
    """LoRA-FA, arXiv 2308.03303."""
    for name, parameter in with_adapter(model).named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return model


def with_some_frozen(model: Any) -> Any:
    """The first layer's adapters, and of a norm that is trained beside the others its weight alone."""
    with_adapter(model).model.layers[0].requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    return model


def with_adapter(model: Any, name: str = "default") -> Any:
    add_adapter(model, LoraConfig(r=4, lora_dropout=0.1), name)
    return model


@pytest.mark.parametrize("name", ["default", "mine"])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    whole = with_adapter(quantized(), name)
    trainer(tmp_path / "whole", whole).train()
    files = set(os.listdir(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    written = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "optimizer.pt",
        "training_args.bin",
    }
    assert written <= files
    assert not {"model.safetensors", "config.json"} & files

    resumed = with_adapter(quantized(), name)
    trainer(tmp_path / "resumed", resumed).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert state_bytes(resumed) == state_bytes(whole)
    loaded = quantized()
    load_adapter(loaded, tmp_path / "resumed" / f"checkpoint-{STEPS}", name)
    assert state_bytes(loaded) == state_bytes(whole)


def test_of_several_adapters_the_active_one_is_saved(tmp_path: Path) -> None:
    model = with_adapter(with_adapter(quantized()), "other")
    run = trainer(tmp_path, model)
    run.train()
    set_adapter(model, ["default", "other"])
    with pytest.raises(ValueError, match=r"expected one active adapter, got \['default', 'other'\]"):
        run.save_model(str(tmp_path / "saved"))
    loaded = quantized()
    load_adapter(loaded, tmp_path / f"checkpoint-{STEPS}", "other")
    delete_adapter(model, "default")
    assert state_bytes(loaded) == state_bytes(model)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_of_a_classifier_is_loaded_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With its head, which trains too. The losses of evaluation rise, so the first is the best."""
    model = with_adapter(quantized(LlamaForSequenceClassification), name)
    model.score.requires_grad_(True)
    how = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True}
    run = trainer(tmp_path, model, **how)
    evaluate, losses = run.evaluate, iter((1.0, 2.0))
    monkeypatch.setattr(
        run, "evaluate", lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_loss": next(losses)}
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    base = LlamaForSequenceClassification(tiny_config(pad_token_id=0))
    for each, best in ((tmp_path / "checkpoint-3", True), (tmp_path / "checkpoint-6", False)):
        other = quantized(LlamaForSequenceClassification)
        load_adapter(other, each, name)
        assert (state_bytes(other) == state_bytes(model)) == best
    run.save_model(str(tmp_path / "best"))
    read = peft.PeftModel.from_pretrained(base, str(tmp_path / "best"))
    assert_same(read.base_model.model.score.modules_to_save["default"].weight.detach(), model.score.weight.detach())


@pytest.mark.parametrize("freeze", [with_frozen_a, with_some_frozen])
@pytest.mark.parametrize("save_only_model", [False, True])
def test_what_is_frozen_stays_frozen(tmp_path: Path, save_only_model: bool, freeze: Callable[[Any], Any]) -> None:
    model = freeze(quantized())
    trainer(tmp_path, model, save_only_model=save_only_model).train()
    resumed = freeze(quantized())
    frozen = {name: p.clone() for name, p in resumed.named_parameters() if not p.requires_grad}
    trainer(tmp_path / "resumed", resumed).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert {name for name, p in resumed.named_parameters() if not p.requires_grad} == frozen.keys()
    assert_same({name: p for name, p in resumed.named_parameters() if name in frozen}, frozen)
    assert (state_bytes(resumed) == state_bytes(model)) != save_only_model  # a resume without its optimizer differs


def test_dropout_stays_as_a_trainer_has_set_it_and_is_the_files_in_what_is_loaded(tmp_path: Path) -> None:
    """TRL's switch it off, when they are made."""

    def build(in_config: float) -> Any:
        add_adapter(model := quantized(), LoraConfig(r=4, lora_dropout=in_config))
        for _, layer in lora_layers(model):
            layer.lora_dropout["default"].p = 0.0
        return model

    def dropouts(model: Any) -> set[tuple[float, float]]:
        """In configs and in what drops."""
        both = ((layer.configs["default"], layer.lora_dropout["default"]) for _, layer in lora_layers(model))
        return {(config.lora_dropout, dropout.p) for config, dropout in both}

    whole, resumed = build(0.1), build(0.3)
    trainer(tmp_path / "whole", whole).train()
    trainer(tmp_path / "resumed", resumed).train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert state_bytes(resumed) == state_bytes(whole)
    assert dropouts(resumed) == {(0.3, 0.0)}
    load_adapter(resumed, tmp_path / "whole" / f"checkpoint-{SAVED}")
    assert dropouts(resumed) == {(0.1, 0.1)}


@pytest.mark.parametrize("way", ["resumed", "the best"])
def test_a_head_beside_the_second_adapter_is_loaded(tmp_path: Path, way: str) -> None:
    def build() -> Any:
        model = with_adapter(with_adapter(quantized(LlamaForSequenceClassification), "first"), "second")
        model.score.requires_grad_(True)
        return model

    model, again = build(), build()
    best = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True} if way == "the best" else {}
    trainer(tmp_path, model, **best).train()
    if way == "resumed":
        trainer(tmp_path / "again", again).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
        assert state_bytes(again) == state_bytes(model)
    assert model.score.weight.requires_grad
    assert {n for _, layer in lora_layers(model) for n in layer.active_adapters} == {"second"}


def without(model: Any) -> Any:
    return model


def with_two_active(model: Any) -> Any:
    set_adapter(with_adapter(with_adapter(model, "one"), "two"), ["one", "two"])
    return model


def with_a_trained_bias(model: Any) -> Any:
    layer = with_adapter(model).model.layers[0].mlp.up_proj
    layer.base_layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return model


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (without, r"AdapterCheckpoints: model: expected one active adapter, got none \(add_adapter gives one\)"),
        (with_two_active, r"AdapterCheckpoints: model: expected one active adapter, got \['one', 'two'\]"),
        (with_a_trained_bias, r"expected trained parameters in modules that PEFT can save whole, got .*up_proj.*bias"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_could_not_be_saved_is_not_trained(
    tmp_path: Path, prepare: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, prepare(quantized()))
    monkeypatch.setattr(run, "training_step", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=message):
        run.train()


@pytest.mark.parametrize("has_it", ["trainer", "collator"])
def test_the_tokenizer_may_be_the_trainers_alone_or_the_collators(has_it: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, with_adapter(quantized()))
    run.processing_class = tiny_tokenizer() if has_it == "trainer" else None
    run.data_collator = DataCollatorWithPadding(tiny_tokenizer()) if has_it == "collator" else default_data_collator
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved/tokenizer.json").exists()


def test_the_only_adapter_is_saved_and_loaded_active_or_not(tmp_path: Path) -> None:
    saved, loaded = with_adapter(quantized()), with_adapter(quantized())
    randomize_adapters(saved)
    for model in (saved, loaded):
        set_adapter(model, None)
    trainer(tmp_path, saved).save_model(str(tmp_path / "saved"))
    trainer(tmp_path, loaded)._load_from_checkpoint(str(tmp_path / "saved"))
    assert state_bytes(loaded) == state_bytes(saved)
    assert not any(layer.active_adapters for _, layer in lora_layers(loaded))


def test_it_loads_into_the_model_that_it_is_given(tmp_path: Path) -> None:
    own, other = with_adapter(quantized()), with_adapter(quantized())
    randomize_adapters(own)
    run = trainer(tmp_path, own)
    run.save_model(str(tmp_path / "saved"))
    run._load_from_checkpoint(str(tmp_path / "saved"), other)
    assert state_bytes(other) == state_bytes(own)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_of_several_processes_one_saves_and_all_what_they_share(
    is_sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_sharded and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 shards floating-point parameters only")
    run = trainer(tmp_path, with_adapter(quantized()))
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if is_sharded:
            fully_shard(run.model, mesh=init_device_mesh("cpu", (1,)))
            run.model(TOKENS[:1])  # after which the outermost group has whole parameters still
        run.save_model(str(tmp_path / "saved"))
    finally:
        dist.destroy_process_group()
    written = {path.name for path in (tmp_path / "saved").glob("*")}
    assert written == ({"adapter_config.json", "adapter_model.safetensors"} if is_sharded else set())
