from __future__ import annotations

import errno
import itertools
import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from tiny_model import one_thread as one_thread
from tiny_training import DATA, SCHEDULE, TOKENIZER, assert_same_tensors, build, interrupt_at, run, trained
from tiny_training import python_handles_interrupts as python_handles_interrupts
from torch import Tensor

from qlora_ext.finetune.data import PadToLongest
from qlora_ext.finetune.encode import IGNORE
from qlora_ext.finetune.evaluate import held_out_loss, sample_answers
from qlora_ext.finetune.load import load_model, open_checkpoint
from qlora_ext.finetune.optimizer import OptimizerChoice
from qlora_ext.finetune.output_folder import newest_checkpoint
from qlora_ext.finetune.train import _arguments, total_steps, train

STATE_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_checkpoint_holds_the_adapter_and_never_the_base(tmp_path: Path, method: str) -> None:
    model, outcome = run(tmp_path, method, save_steps=3)
    assert (outcome.step, outcome.interrupted, len(outcome.losses)) == (8, False, 8)
    checkpoints = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-6", "checkpoint-8"}, "the last two are kept, and the last step is saved"
    for name in checkpoints:
        assert {path.name for path in (tmp_path / name).iterdir()} == STATE_FILES | ADAPTER_FILES
    assert {path.name for path in tmp_path.iterdir()} == checkpoints | ADAPTER_FILES
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == len(trained(model)) == 28
    assert all(".lora_A." in key or ".lora_B." in key for key in stored)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("call", [6, 13], ids=["in an epoch", "at the end of an epoch"])
def test_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, method: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_model, whole = run(tmp_path / "whole", method)
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        _, first = run(tmp_path / "parts", method)
    assert first.interrupted
    assert 0 < first.step < 8
    assert newest_checkpoint(tmp_path / "parts") == tmp_path / "parts" / f"checkpoint-{first.step}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    model, second = run(tmp_path / "parts", method, resume=True)
    assert not second.interrupted
    assert second.losses == whole.losses
    assert_same_tensors(trained(model), trained(whole_model))
    assert first.tokens + second.tokens == whole.tokens


def test_resume_of_a_finished_run_takes_no_step(tmp_path: Path) -> None:
    whole_model, whole = run(tmp_path, "qlora")
    model, again = run(tmp_path, "qlora", resume=True)
    assert (again.step, again.tokens, again.losses) == (8, 0, whole.losses)
    assert_same_tensors(trained(model), trained(whole_model))


def test_resume_saves_and_evaluates_at_its_own_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, steps=2, save_steps=100, eval_steps=100)
    logger = logging.getLogger("transformers.trainer_utils")
    logger.addHandler(caplog.handler)  # transformers' loggers do not propagate
    try:
        _, outcome = run(tmp_path, steps=8, save_steps=3, eval_steps=4, resume=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert [step for step, _ in outcome.held_out] == [2, 4, 8]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    assert caplog.messages == []


DAMAGED = {
    "{bad": "expected the state of a run, got a damaged file",
    "[]": "expected the state of a run, got a damaged file",
    "{}": "expected the state of checkpoint-2, got global_step 0",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    run(tmp_path, steps=2)
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint-2/trainer_state\.json: " + DAMAGED[content]):
        run(tmp_path, steps=4, resume=True)


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint to resume from, got none"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_evaluation_does_not_change_training(tmp_path: Path, method: str) -> None:
    quiet_model, quiet = run(tmp_path / "quiet", method)
    model, outcome = run(tmp_path / "evaluated", method, eval_steps=1)
    assert [step for step, _ in outcome.held_out] == list(range(1, 9))
    assert outcome.held_out[-1][1] == held_out_loss(model, DATA.held_out, PadToLongest(0), 2)
    assert quiet.held_out == []
    assert outcome.losses == quiet.losses
    assert_same_tensors(trained(model), trained(quiet_model))


def test_a_run_in_bfloat16_is_evaluated_in_it(tmp_path: Path) -> None:
    model, schedule = build("full"), replace(SCHEDULE, steps=1, eval_steps=1, loss_chunk=2)
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    outcome = train(model, TOKENIZER, DATA, schedule, tmp_path, adapter=False, autocast=True)
    assert {each.dtype for each in logits} == {torch.bfloat16}
    of = DATA.held_out, PadToLongest(0), 2
    expected, exact = (held_out_loss(model, *of, autocast=on, chunk=2) for on in (True, False))
    assert outcome.held_out[-1][1] == expected != exact


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    _, plain = run(tmp_path / "plain", "qlora")
    _, checkpointed = run(tmp_path / "checkpointed", "qlora", gradient_checkpointing=True)
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-5)


def test_training_learns_and_measures(tmp_path: Path) -> None:
    model, outcome = run(tmp_path, steps=80, lr=3e-2, kind="constant")
    # A random head of small weights cannot say much: its logits stay within 1.3, so the loss above 4.2.
    assert sum(outcome.losses[-5:]) < 0.95 * sum(outcome.losses[:5])
    bytes_trained = sum(p.nbytes for p in trained(model).values())
    assert outcome.gradient_bytes == bytes_trained
    moments = 2 * bytes_trained
    assert moments <= outcome.optimizer.state_bytes <= moments + 4 * len(trained(model))  # a step count for each


def test_the_first_token_of_a_window_of_text_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [replace(example, labels=example.input_ids) for example in DATA.train[:2]]
    expected = held_out_loss(build("lora"), windows, PadToLongest(0), 2)
    monkeypatch.setattr(tiny_training, "DATA", replace(DATA, train=windows))
    _, outcome = run(tmp_path, steps=1, accumulate=1)
    assert outcome.losses == pytest.approx([expected], rel=1e-5)


def test_tokens_are_those_of_the_input_without_padding(tmp_path: Path) -> None:
    _, outcome = run(tmp_path, steps=6)  # one epoch
    assert outcome.tokens == sum(len(example.input_ids) for example in DATA.train)


def test_full_fine_tuning_saves_a_model_that_loads(tmp_path: Path) -> None:
    model, _ = run(tmp_path, "full", steps=2)
    assert not any(path.suffix in (".bin", ".pt") for path in tmp_path.iterdir())
    checkpoint = open_checkpoint(str(tmp_path))
    loaded = load_model(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert checkpoint.tokenizer().chat_template == TOKENIZER.chat_template


def test_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+: try a lower learning rate"):
        run(tmp_path, lr=1e30)


def test_held_out_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the held-out loss is (nan|inf) at step 1: try a lower learning rate"):
        run(tmp_path, steps=1, lr=1e30, warmup=0, eval_steps=1)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("of another kind")], ids=repr
)
def test_save_cut_short_leaves_no_checkpoint(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    expected = f"No space left on device: '{tmp_path}'" if isinstance(error, OSError) else "^of another kind$"
    with pytest.raises(type(error), match=expected):
        run(tmp_path, save_steps=2)
    assert newest_checkpoint(tmp_path) is None


class Payload:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.ran,)


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw32"])
def test_checkpoint_state_is_never_unpickled(kind: str, tmp_path: Path) -> None:
    run(tmp_path, steps=2, optimizer=OptimizerChoice(kind))
    ran = tmp_path / "ran"
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save(Payload(ran), tmp_path / "checkpoint-2" / name)
    with pytest.raises(ValueError, match="checkpoint-2: expected training state of plain values and tensors"):
        run(tmp_path, steps=4, resume=True, optimizer=OptimizerChoice(kind))
    assert not ran.exists()


def test_total_steps_counts_as_the_trainer_does(tmp_path: Path) -> None:
    assert total_steps(21, 1, 2, 2) == 6
    assert total_steps(21, 2.5, 2, 2) == 15
    assert total_steps(10, 1.1, 1, 1) == 11
    assert total_steps(1, 1, 8, 4) == 1
    _, outcome = run(tmp_path, steps=total_steps(len(DATA.train), 2, 2, 2))
    assert outcome.step == 12


def test_held_out_loss_is_the_mean_over_labelled_tokens() -> None:
    model = build("lora").train()
    total = count = 0.0
    for one in DATA.held_out:
        logits = model.eval()(torch.tensor([one.input_ids])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(one.labels[1:]):
            if label != IGNORE:
                total, count = total - logits[position, label].item(), count + 1
    model.train()
    before = torch.random.get_rng_state()
    for batch_size in (1, 2, 8):
        loss = held_out_loss(model, DATA.held_out, PadToLongest(TOKENIZER.pad_token_id), batch_size)
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_sample_answers_are_greedy_and_stop_at_a_special_token() -> None:
    model = build("lora")
    prompt = DATA.held_out[0].input_ids[:3]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = TOKENIZER.decode(ids[3:], skip_special_tokens=True).strip()
    assert sample_answers(model, TOKENIZER, DATA.held_out[:1], max_new_tokens=5) == [expected]

    with torch.no_grad():  # a model that can only say the end-of-turn token
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(64, 258)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[TOKENIZER.eos_token_id] = 1
    assert sample_answers(model, TOKENIZER, DATA.held_out[:2]) == ["", ""]


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"), [(1, 0.03, 0), (1, 0, 0), (3, 0.9, 2), (100, 0.03, 3), (2, 5, 5)]
)
def test_a_share_of_warmup_leaves_a_step_to_train(steps: int, warmup: float, expected: int, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, steps=steps, warmup=warmup)
    assert _arguments(schedule, tmp_path, torch.device("cpu"), autocast=False).get_warmup_steps(steps) == expected


def test_seconds_are_those_of_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tick a step: neither evaluations nor saves look at the clock."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("qlora_ext.finetune.callbacks.time", clock)
    _, outcome = run(tmp_path, eval_steps=2, save_steps=3)
    assert outcome.seconds == 8
