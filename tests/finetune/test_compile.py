"""--compile: the layers share their graphs, whatever the length of a batch, and train as they do without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from random_layers import randomize_adapters
from tiny_model import one_thread as one_thread
from tiny_model import save_tiny_model, tiny_config, tiny_tokenizer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import config
from transformers import LlamaForCausalLM

import qlora_ext
from qlora_ext.finetune import __main__ as cli
from qlora_ext.finetune.compile import compile_layers
from qlora_ext.finetune.data import PadToLongest
from qlora_ext.finetune.encode import IGNORE, Example
from qlora_ext.finetune.evaluate import held_out_loss, sample_answers
from qlora_ext.finetune.loss import answer_loss
from qlora_ext.finetune.train import CHECKPOINTING

LAYERS = 3


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(method: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=LAYERS))
    if method == "qlora":
        qlora_ext.quantize_model(model)
    if method != "full":
        qlora_ext.add_adapter(model, qlora_ext.LoraConfig(r=4))
        randomize_adapters(model)
    return model.train()


def batch(length: int) -> dict[str, Tensor]:
    ids = [[(7 * i + 5 * j) % 250 for j in range(length - i)] for i in range(3)]
    return PadToLongest(0)([Example(row, [IGNORE] * 2 + row[2:], 2, "") for row in ids])


def losses_and_gradients(model: LlamaForCausalLM) -> list[Tensor]:
    results = []
    for length in (8, 11, 40):
        model.zero_grad()
        loss, _ = answer_loss(model, batch(length), 5)
        loss.backward()
        results += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return results


@pytest.mark.parametrize(
    ("method", "checkpointing", "graphs"), [("qlora", False, 2), ("qlora", True, 1), ("full", False, 1)]
)
def test_layers_share_their_graphs(method: str, checkpointing: bool, graphs: int) -> None:
    """Two graphs where the first layer's input needs no gradient; with checkpointing, or gradients for all, one."""
    expected = losses_and_gradients(build(method))
    model = build(method)
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_checkpointing_enable")({"use_reentrant": False})
    assert compile_layers(model, CompileCounterWithBackend("aot_eager")) == LAYERS
    for got, same in zip(losses_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(got, same)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


def test_evaluation_and_generation_compile_nothing() -> None:
    model = build("qlora")
    backend = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend)
    examples = [Example([3, 4, 5, 6], [IGNORE] * 2 + [5, 6], 2, "")]
    eager, tokenizer = build("qlora"), tiny_tokenizer()
    losses = [held_out_loss(each, examples, PadToLongest(0), 1) for each in (model, eager)]
    answers = [sample_answers(each, tokenizer, examples, max_new_tokens=4) for each in (model, eager)]
    assert (losses[0], answers[0]) == (losses[1], answers[1])
    assert backend.frame_count == 0


def test_model_without_layers_is_refused() -> None:
    class Bare(nn.Module):
        device = torch.device("cpu")

    with pytest.raises(ValueError, match="--compile: Bare: expected layers of transformers' kind, got none"):
        compile_layers(Bare())


def test_missing_compiler_is_named() -> None:
    no_compiler = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(ValueError, match=r"--compile: expected a C\+\+ compiler, got none"):
        compile_layers(build("lora"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_command_line(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are those of a run without it; inductor spends a minute in the C++ compiler."""
    monkeypatch.setattr("qlora_ext.finetune.run.compile_layers", partial(compile_layers, backend=backend))
    save_tiny_model(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "response": "a" * (i % 7 + 1)}) + "\n" for i in range(30))
    )
    losses = []
    for name in ("eager", "compiled"):
        command = ["--model", str(tmp_path / "model"), "--data", str(data), "--method", "qlora", "--samples", "1"]
        command += ["--steps", "3", "--batch-size", "4", "--dtype", "fp32", "--output", str(tmp_path / name)]
        options = ["--compile", "--loss-chunk", "4", "--attention", "eager"] if name == "compiled" else []
        assert cli.main([*command, *options]) == 0
        losses.append(json.loads((tmp_path / name / "report.json").read_text())["losses"])
        assert (tmp_path / name / "adapter_model.safetensors").exists()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
