"""TRL's trainers, transformers' Trainer and pipeline, and PEFT's preparation, on models quantized by NF4Config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tiny_model import one_thread as one_thread
from tiny_model import save_tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)

from qlora_ext import Linear4bit, NF4Config, PagedAdamW

TEXTS = Dataset.from_list([{"text": f"{i} and {i} are {2 * i}."} for i in range(16)])
PAIRS = Dataset.from_list([{"prompt": f"{i} and {i}?", "completion": f" {2 * i}."} for i in range(8)])
PREFERENCES = Dataset.from_list([{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"{i} no!"} for i in range(8)])
MASKED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.1)  # weights that count, and say more
    return folder


def load_base(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), **options)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def arguments(kind: type, output: Path, **changes: Any) -> Any:
    """In float32; an epoch of 16 rows is 4 steps."""
    options = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if kind is not TrainingArguments:
        options["gradient_checkpointing"] = False
    return kind(**options | changes)


def sft(folder: Path, output: Path, data: Dataset = TEXTS, *, dropout: float = 0.0, **changes: Any) -> Any:
    own = {key: changes.pop(key) for key in ("eval_dataset", "processing_class", "callbacks") if key in changes}
    return trl.SFTTrainer(
        str(folder),
        args=arguments(trl.SFTConfig, output, **changes),
        train_dataset=data,
        quantization_config=NF4Config(),
        peft_config=lora(lora_dropout=dropout),
        **own,
    )


def logged(trainer: Any, what: str = "loss") -> list[float]:
    return [entry[what] for entry in trainer.state.log_history if what in entry]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def stored(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of all 4-bit layers, whatever they are wrapped in."""
    layers = [(name.replace(".base_layer", ""), m) for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    return {f"{name.split('layers.')[-1]}.{key}": t.clone() for name, m in layers for key, t in m.state_dict().items()}


def cross_entropy(folder: Path, ids: Tensor, labels: Tensor) -> float:
    """The mean loss of the quantized model without an adapter, from its logits."""
    with torch.no_grad():
        logits = load_base(folder)(input_ids=ids).logits
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()))


def test_sft_learns_evaluates_and_resumes_as_if_uninterrupted(folder: Path, tmp_path: Path) -> None:
    """With dropout: the checkpoint's random state has to reach the fused layer's seeds.

    In float32: TRL makes adapters bfloat16, but PEFT float32 when Trainer resumes, bitsandbytes' layers or ours.
    """
    options = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}

    def trainer(name: str) -> Any:
        made = sft(folder, tmp_path / name, eval_dataset=TEXTS, **options)
        for p in adapter_parameters(made.model).values():
            p.data = p.data.float()
        return made

    whole = trainer("whole")
    before = stored(whole.model)
    whole.train()
    losses, evaluated = logged(whole), logged(whole, "eval_loss")
    assert losses[0] == pytest.approx(math.log(258), rel=0.05), "as of a random model"
    assert losses[-1] < 0.7 * losses[0]
    assert evaluated[1] < 0.95 * evaluated[0]
    assert_same(stored(whole.model), before)

    saved = tmp_path / "whole" / "checkpoint-3"
    keys = load_file(saved / "adapter_model.safetensors").keys()
    assert len(keys) == 2 * 7 * 2
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(saved))
    assert logged(resumed) == losses
    assert logged(resumed, "eval_loss") == evaluated
    assert_same(adapter(resumed.model), adapter(whole.model))


class Calls(TrainerCallback):
    """How often the first MLP was computed."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        (mlp,) = [module for name, module in model.named_modules() if name.endswith("layers.0.mlp")]
        mlp.register_forward_pre_hook(self.called)

    def called(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_loss(folder: Path, tmp_path: Path, use_reentrant: bool) -> None:
    plain_calls, calls = Calls(), Calls()
    plain = sft(folder, tmp_path / "plain", dropout=0.1, callbacks=[plain_calls], max_steps=4)
    plain.train()
    kwargs = {"use_reentrant": use_reentrant}
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs, "max_steps": 4}
    checkpointed = sft(folder, tmp_path / "checkpointed", dropout=0.1, callbacks=[calls], **changes)
    checkpointed.train()
    assert (plain_calls.count, calls.count) == (4, 8)
    assert logged(checkpointed) == logged(plain)
    assert_same(adapter(checkpointed.model), adapter(plain.model))


def test_packed_texts_do_not_see_each_other(folder: Path, tmp_path: Path) -> None:
    """The loss of all texts at once is the same whether they are padded, or packed into rows of 64 tokens."""
    options = {"max_steps": 1, "per_device_train_batch_size": 16, "max_length": 64}
    padded, packed = (
        sft(folder, tmp_path / str(packing), packing=packing, packing_strategy="bfd", **options)
        for packing in (False, True)
    )
    assert len(padded.train_dataset) == 16
    assert len(packed.train_dataset) <= 6
    for trainer in (padded, packed):
        trainer.train()
    assert logged(packed)[0] == pytest.approx(logged(padded)[0], rel=1e-5)
    for name, p in adapter(padded.model).items():
        torch.testing.assert_close(adapter(packed.model)[name], p, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("what", ["completion", "assistant"])
def test_only_answers_count(folder: Path, tmp_path: Path, what: str) -> None:
    tokenizer = tiny_tokenizer(MASKED_CHATML)
    data, option = PAIRS, {"completion_only_loss": True}
    if what == "assistant":
        option = {"assistant_only_loss": True}
        turns = [
            [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in PAIRS
        ]
        data = Dataset.from_list([{"messages": turn} for turn in turns])
    sizes = {"max_steps": 1, "per_device_train_batch_size": 8}
    trainer = sft(folder, tmp_path, data, processing_class=tokenizer, **sizes, **option)
    (batch,) = trainer.get_train_dataloader()
    counted = {tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert counted == {f"{row['completion']}<|im_end|>" for row in PAIRS}
    trainer.train()
    expected = cross_entropy(folder, batch["input_ids"], batch["labels"])
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert abs(cross_entropy(folder, batch["input_ids"], batch["input_ids"]) - expected) > 1e-3


@pytest.mark.parametrize("state_bits", [32, 8])
def test_trainer_with_paged_adamw_resumes(folder: Path, tmp_path: Path, state_bits: int) -> None:
    tokens = tiny_tokenizer()(list(TEXTS["text"]))["input_ids"]
    examples = [{"input_ids": ids[:12], "labels": ids[:12]} for ids in tokens]

    def trainer(output: Path) -> Trainer:
        set_seed(0)
        return Trainer(
            model=get_peft_model(load_base(folder), lora(r=64, lora_alpha=64, lora_dropout=0.1)),
            args=arguments(TrainingArguments, output, save_strategy="steps", save_steps=3),
            train_dataset=examples,
            optimizer_cls_and_kwargs=(PagedAdamW, {"lr": 5e-3, "state_bits": state_bits}),
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    losses = logged(whole)
    assert losses[-1] < 0.8 * losses[0]
    states = whole.optimizer.state_dict()["state"].values()
    assert {state["exp_avg"].dtype for state in states if state["exp_avg"].numel() >= 4096} == {
        {32: torch.float32, 8: torch.uint8}[state_bits]
    }
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(resumed) == losses
    assert_same(adapter(resumed.model), adapter(whole.model))


def test_dpo_takes_the_model_without_its_adapter_as_the_reference(folder: Path, tmp_path: Path) -> None:
    trainer = trl.DPOTrainer(
        str(folder),
        args=arguments(trl.DPOConfig, tmp_path, max_steps=4, per_device_train_batch_size=8, learning_rate=5e-3),
        train_dataset=PREFERENCES,
        quantization_config=NF4Config(),
        peft_config=lora(),
    )
    assert trainer.ref_model is None
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.9 * losses[0]
    assert logged(trainer, "rewards/accuracies")[-1] == 1

    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))
    with torch.no_grad():
        logits = load_base(folder)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        adapted = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    of_tokens = [
        each[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0] for each in (logits, adapted)
    ]
    base, trained = ((each * batch["completion_mask"][:, 1:]).sum(1) for each in of_tokens)
    torch.testing.assert_close(reference, base, rtol=1e-5, atol=1e-4)
    assert (trained - base).abs().min() > 0.1


def test_reward_trains_the_score_head(folder: Path, tmp_path: Path) -> None:
    """Under autocast: TRL makes all that trains bfloat16, the head too, so a float32 model could not call it."""
    trainer = trl.RewardTrainer(
        str(folder),
        args=arguments(trl.RewardConfig, tmp_path, max_steps=6, per_device_train_batch_size=8, bf16=True),
        train_dataset=PREFERENCES,
        quantization_config=NF4Config(),
        peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    (score,) = [m for name, m in trainer.model.named_modules() if name.endswith("score")]
    assert not isinstance(score.original_module, Linear4bit)
    before = score.original_module.weight.clone()
    trainer.train()
    losses = logged(trainer)
    assert losses[0] > 0.3, "as of a random head"
    assert losses[-1] < 0.05
    assert torch.equal(score.original_module.weight, before)
    assert not torch.equal(score.modules_to_save["default"].weight.float(), before.float())

    trainer.save_model()
    options = {"quantization_config": NF4Config(), "num_labels": 1}
    base = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.arange(20).view(2, 10)
    for model in (loaded, trainer.model.eval()):
        model.config.pad_token_id = 257
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits.float(), rtol=0.01, atol=0.01)


def test_grpo_generates_and_learns(folder: Path, tmp_path: Path) -> None:
    """The reward is the share of even bytes: half at first."""

    def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        str(folder),
        reward_funcs=even,
        args=arguments(
            trl.GRPOConfig,
            tmp_path,
            max_steps=2,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=8,
        ),
        train_dataset=PAIRS.select_columns("prompt"),
        quantization_config=NF4Config(),
        peft_config=lora(),
    )
    before = stored(trainer.model)
    trainer.train()
    assert logged(trainer, "reward")[0] == pytest.approx(0.5, abs=0.25)
    assert len(logged(trainer, "loss")) == 2
    assert all(0 < norm < 100 for norm in logged(trainer, "grad_norm"))
    assert all(p.any() for name, p in adapter(trainer.model).items() if "lora_B" in name)
    assert_same(stored(trainer.model), before)


def test_prepare_model_for_kbit_training(folder: Path, tmp_path: Path) -> None:
    model = load_base(folder, dtype=torch.bfloat16)
    before = stored(model)
    assert model.model.norm.weight.dtype == torch.bfloat16
    model = prepare_model_for_kbit_training(model)
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name} == {torch.float32}
    assert_same(stored(model), before)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing
    assert model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long)).requires_grad
    tokens = tiny_tokenizer()(list(TEXTS["text"]))["input_ids"]
    trainer = Trainer(
        model=get_peft_model(model, lora()),
        args=arguments(TrainingArguments, tmp_path),
        train_dataset=[{"input_ids": ids[:12], "labels": ids[:12]} for ids in tokens],
    )
    trainer.train()
    assert logged(trainer)[-1] < 0.8 * logged(trainer)[0]


def test_generation_with_an_adapter_is_that_of_the_dequantized_model(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_base(folder), lora()).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    dense = load_base(folder).dequantize()
    assert not any(isinstance(module, Linear4bit) for module in dense.modules())
    dense = PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()

    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    prompts = ["3 and 4?", "Who is it that asks?"]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 257}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert (model(**inputs).logits - dense(**inputs).logits).abs().max() > 0.1
    tokens = model.generate(**inputs, **options)
    assert torch.equal(tokens, dense.generate(**inputs, **options))
    assert len(set(tokens[:, -20:].flatten().tolist())) > 4

    say = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = say(prompts[1], return_full_text=False, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert said[0]["generated_text"] == tokenizer.decode(tokens[1, -20:], skip_special_tokens=True)


def test_trainer_refuses_a_model_without_an_adapter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model=load_base(folder), args=arguments(TrainingArguments, tmp_path), train_dataset=[])
