"""The loss by chunks: the value and the gradients of the whole one, without its logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import randomize_adapters
from tiny_model import one_thread as one_thread
from tiny_model import tiny_config, tiny_tokenizer
from tiny_training import SCHEDULE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    set_seed,
)

import qlora_ext
from qlora_ext.finetune.data import Dataset, PadToLongest
from qlora_ext.finetune.encode import IGNORE, Example
from qlora_ext.finetune.evaluate import held_out_loss
from qlora_ext.finetune.loss import answer_loss, check_head, chunked_cross_entropy, suitable_chunk
from qlora_ext.finetune.train import Outcome, train

VOCABULARY = 258
CHUNKS = (1, 3, 7, 100)


def build(method: str, *, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).to(dtype)
    if method == "qlora":
        qlora_ext.quantize_model(model)
    if method != "full":
        config = qlora_ext.LoraConfig(r=4, target_modules=r".*(_proj|lm_head)" if method == "head" else "all-linear")
        qlora_ext.add_adapter(model, config)
        randomize_adapters(model)
    return model.train()


def batch(first: int = 0) -> dict[str, Tensor]:
    """Two prompts and answers of different lengths, from this token on: 7 labelled tokens and 4."""
    lengths = (12, 9)
    ids = [[(first + 7 * i + 5 * j) % 250 for j in range(length)] for i, length in enumerate(lengths)]
    labels = [[IGNORE] * 5 + row[5:] for row in ids]
    return PadToLongest(0)([Example(*pair, 3, "") for pair in zip(ids, labels, strict=True)])


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_to_whole(model: PreTrainedModel, chunk: int, tolerance: float) -> None:
    """Loss and gradients, each as a whole: |got - expected| <= tolerance * |expected|."""
    whole, tokens = answer_loss(model, batch())
    expected = gradients(model, whole / 11)
    loss, counted = answer_loss(model, batch(), chunk)
    got = gradients(model, loss / 11)
    assert tokens == counted == 11
    assert (loss - whole).abs() <= tolerance * whole
    assert got.keys() == expected.keys()
    assert len(got) == len([p for p in model.parameters() if p.requires_grad])
    for name, grad in expected.items():
        assert grad.norm() > 0
        assert (got[name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", ["qlora", "full", "head"])
@pytest.mark.parametrize("rows", [100, 4], ids=["whole", "by-4-rows"])
def test_equals_the_whole_loss(rows: int, method: str, tied: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that has room for as many rows makes of a chunk one part, or several, as with a large vocabulary."""
    monkeypatch.setattr("qlora_ext.finetune.loss.CACHED", rows * VOCABULARY)
    assert_close_to_whole(build(method, tied=tied), chunk, tolerance=1e-5)


def test_error_in_bfloat16_is_that_of_the_whole_loss() -> None:
    """At most twice: both round the logits and their gradient, one of them divides by the number of tokens before.

    Of several models together: of one, some parameter's error in the whole loss may be small by luck. That of all
    parameters of one is at most 1.5 times as large. Of eight batches: of one alone it was 0.6 to 1.7 times.
    """
    errors: dict[str, Tensor] = {}
    for seed in range(4):
        model = build("qlora", dtype=torch.bfloat16, seed=seed)
        wide = build("qlora", dtype=torch.bfloat16, seed=seed).float()
        squares: dict[str, Tensor] = {}
        for each in (batch(31 * i) for i in range(8)):
            both = [gradients(model, answer_loss(model, each, chunk)[0] / 11) for chunk in (3, None)]
            for name, exact in gradients(wide, answer_loss(wide, each)[0] / 11).items():
                of_both = torch.stack([(one[name] - exact).square().sum() for one in both])
                squares[name] = squares.get(name, 0) + of_both
        of_chunked, of_whole = sum(squares.values()).sqrt()
        assert of_chunked <= 1.5 * of_whole
        errors = {name: errors.get(name, 0) + square for name, square in squares.items()}
    for name, (of_chunked, of_whole) in errors.items():
        assert of_chunked.sqrt() <= 2 * of_whole.sqrt(), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equals_the_whole_loss_under_autocast(tied: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_to_whole(build("full", tied=tied), 3, tolerance=0.02)


def test_gradient_by_finite_differences() -> None:
    head, labels = nn.Linear(5, 11).double(), torch.tensor([3, 0, 10, 3])
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        return chunked_cross_entropy(x, head, labels, 3)

    # The sum is made in float32, hence the wide step and tolerance.
    assert torch.autograd.gradcheck(loss, (hidden, *head.parameters()), eps=1e-2, atol=1e-3, rtol=1e-2)


def test_no_token_gives_no_loss() -> None:
    hidden = torch.randn(0, 5, requires_grad=True)
    loss = chunked_cross_entropy(hidden, nn.Linear(5, 11), torch.empty(0, dtype=torch.int64), 3)
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, 5)


class LargestLogits(TorchDispatchMode):
    """The most elements of a tensor [..., VOCABULARY] that an op returns, views (of the head's weight) left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not func.is_view and tensor.shape[-1:] == (VOCABULARY,):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("chunk", "tokens"), [(None, 11), (3, 3), (1, 1)])
def test_logits_of_a_chunk_at_most(chunk: int | None, tokens: int) -> None:
    model = build("qlora")
    with LargestLogits() as largest:
        loss, _ = answer_loss(model, batch(), chunk)
        loss.backward()
    assert largest.elements == tokens * VOCABULARY


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_nothing_is_kept_without_gradients(frozen: bool) -> None:
    model = build("full").requires_grad_(not frozen)
    with torch.no_grad():
        loss, _ = answer_loss(model, batch(), 3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, answer_loss(model, batch())[0].detach())


def run(folder: Path, chunk: int | None, method: str) -> tuple[dict[str, Tensor], Outcome]:
    examples = [
        Example([i, 3, 5, *range(40, 43 + i % 5)], [IGNORE] * 3 + list(range(40, 43 + i % 5)), 3, "") for i in range(21)
    ]
    model = build(method)
    set_seed(1)
    schedule = replace(SCHEDULE, steps=5, accumulate=3, lr=1e-3, eval_steps=2, loss_chunk=chunk)
    data = Dataset(examples[5:], examples[:5], 0, 0, 0)
    outcome = train(model, tiny_tokenizer(), data, schedule, folder, adapter=method != "full")
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, outcome


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_training_with_accumulation_takes_the_same_steps(tmp_path: Path, method: str) -> None:
    """The mean is over the labelled tokens of a whole step, which the trainer counts before its forward passes."""
    expected, whole = run(tmp_path / "whole", None, method)
    got, chunked = run(tmp_path / "chunked", 2, method)
    assert chunked.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [loss for _, loss in chunked.held_out] == pytest.approx([loss for _, loss in whole.held_out], rel=1e-4)
    for name, parameter in expected.items():
        torch.testing.assert_close(got[name], parameter, rtol=1e-3, atol=2e-4, msg=name)


def test_a_run_makes_logits_of_a_chunk_at_most(tmp_path: Path) -> None:
    """In its steps and in its evaluations."""
    with LargestLogits() as largest:
        run(tmp_path, 2, "qlora")
    assert largest.elements == 2 * VOCABULARY


class NoLossArguments(LlamaForCausalLM):
    """As Gemma 3n and 4, for which Trainer counts no tokens."""

    accepts_loss_kwargs = False


@pytest.mark.parametrize("kind", ["gpt2", "no loss arguments"])
@pytest.mark.parametrize("labels_from", [0, 3], ids=["all", "answers"])
def test_accumulation_is_one_large_batch(tmp_path: Path, kind: str, labels_from: int) -> None:
    """Of examples of 2 to 12 tokens, each token of a step weighs the same, and the first of an example nothing."""
    rows = [list(range(20 + i, 32 + i))[: 4 + 8 * (i % 2)] for i in range(4)]
    examples = [Example(row, [IGNORE] * labels_from + row[labels_from:], 3, "") for row in rows]
    losses, trained = [], []
    for batch_size, accumulate in ((4, 1), (1, 4), (2, 2)):
        torch.manual_seed(0)
        plain = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY}
        dropout = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
        model = GPT2LMHeadModel(GPT2Config(**plain, **dropout)) if kind == "gpt2" else NoLossArguments(tiny_config())
        if batch_size == 4:
            first = answer_loss(model, PadToLongest(0)(examples))
        set_seed(1)
        schedule = replace(SCHEDULE, steps=1, batch_size=batch_size, accumulate=accumulate, warmup=0, lr=1e-3)
        folder = tmp_path / f"{batch_size}"
        outcome = train(model, tiny_tokenizer(), Dataset(examples, [], 0, 0, 0), schedule, folder, adapter=False)
        losses += outcome.losses
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses == pytest.approx([(first[0] / first[1]).item()] * 3, rel=1e-5)
    for got in trained[1:]:
        assert (got - trained[0]).norm() < 1e-2 * 1e-3 * len(got) ** 0.5, "AdamW's first step is lr in each place"


def test_held_out_loss_by_chunks() -> None:
    model = build("qlora")
    examples = [Example([i, 3, 5, 40 + i, 41], [IGNORE] * 3 + [40 + i, 41], 3, "") for i in range(5)]
    expected = held_out_loss(model, examples, PadToLongest(0), 2)
    assert held_out_loss(model, examples, PadToLongest(0), 2, chunk=3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["qlora", "full", "head"])
def test_head_of_a_llama_is_accepted(method: str) -> None:
    model = build(method, tied=False)
    check_head(model)
    assert model.training
    assert not model.lm_head._forward_hooks
    assert suitable_chunk(model) == (256 if method == "qlora" else None), "a head that trains has its logits at once"


def test_head_whose_logits_are_capped_is_refused() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=32))
    with pytest.raises(ValueError, match="--loss-chunk: Gemma2ForCausalLM: expected the result of lm_head as logits"):
        check_head(model)
    assert suitable_chunk(model) is None


def test_head_of_another_name_is_refused() -> None:
    class Renamed(LlamaForCausalLM):
        def get_output_embeddings(self) -> nn.Module:
            return self.model.embed_tokens

    with pytest.raises(ValueError, match=r"Renamed: expected the output head lm_head, got 'model\.embed_tokens'"):
        check_head(Renamed(tiny_config()))


def test_head_whose_logits_the_model_computes_itself_is_refused() -> None:
    class Reading(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> Any:
            output = self.model(input_ids)
            output.logits = F.linear(output.last_hidden_state, self.lm_head.weight)
            return output

    with pytest.raises(ValueError, match="--loss-chunk: Reading: expected the result of lm_head as logits"):
        check_head(Reading(tiny_config()))


def test_head_whose_logits_the_model_scales_in_place_is_refused() -> None:
    class Scaling(LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits.mul_(0.5)
            return output

    with pytest.raises(ValueError, match="--loss-chunk: Scaling: expected the result of lm_head as logits"):
        check_head(Scaling(tiny_config()))


def test_gradient_of_a_head_in_bfloat16_is_summed_in_fp32() -> None:
    """Each token adds 0.25: in bfloat16 a sum stops growing at 64."""
    head, labels = nn.Linear(4, 4).bfloat16(), torch.zeros(2000, dtype=torch.int64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    chunked_cross_entropy(torch.randn(2000, 4).bfloat16(), head, labels, 1).backward()
    assert head.bias.grad.tolist() == pytest.approx([-1500, 500, 500, 500], rel=0.01)


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_loss_of_a_model_in_bfloat16_is_in_fp32(chunk: int | None) -> None:
    assert answer_loss(build("qlora", dtype=torch.bfloat16), batch(), chunk)[0].dtype == torch.float32
