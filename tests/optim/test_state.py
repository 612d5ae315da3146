"""The states of PagedAdamW outside of its pages: state_dict, to torch and back, and the file of save_states."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import PAGINGS, bits, paging, parameters, set_gradients, state_bits, take_steps, train
from safetensors.torch import load_file
from torch.nn import Parameter

from qlora_ext import PagedAdamW
from qlora_ext.optim import paged_parameters, state_file

LR = 1e-2
BAD_STEPS = ["null", '{"9": 1}', *(f'{{"0": {n}}}' for n in ("-1", "1e30", "2.5", "Infinity", "true", 10**21))]


@pytest.mark.parametrize("name", PAGINGS)
def test_torch_loads_our_state_dict_and_we_torchs(name: str, tmp_path: Path) -> None:
    options = paging(name, tmp_path)
    params, ours = train(partial(PagedAdamW, lr=LR, **options), 5)
    theirs = torch.optim.AdamW(copied := [Parameter(p.detach().clone()) for p in params], fused=True)
    theirs.load_state_dict(ours.state_dict())
    assert state_bits(theirs) == state_bits(ours)
    assert theirs.param_groups[0]["lr"] == LR
    take_steps(copied, theirs, range(5, 7))  # it runs on
    back = PagedAdamW(again := [Parameter(p.detach().clone()) for p in copied], **paging(name, tmp_path))
    back.load_state_dict(theirs.state_dict())
    assert state_bits(back) == state_bits(theirs)
    take_steps(again, back, range(7, 9))
    take_steps(copied, theirs, range(7, 9))
    for p, q in zip(again, copied, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resident", "half"])
@pytest.mark.parametrize("how", ["state_dict", "file"])
@pytest.mark.parametrize(
    "options", [{}, {"state_bits": 8}, {"stochastic_rounding": True, "seed": 5}], ids=["32", "8", "stochastic"]
)
def test_a_resumed_run_is_the_same_run(name: str, how: str, options: dict[str, Any], tmp_path: Path) -> None:
    make = lambda: partial(PagedAdamW, lr=LR, **options, **paging(name, tmp_path))  # noqa: E731
    expected, whole = train(make(), 20, torch.bfloat16)
    params, first = train(make(), 10, torch.bfloat16)
    torch.save([p.detach() for p in params], tmp_path / "model.pt")
    if how == "file":
        first.save_states(tmp_path / "states.safetensors")
    else:
        torch.save(first.state_dict(), tmp_path / "states.pt")
    resumed = [Parameter(p) for p in torch.load(tmp_path / "model.pt")]
    second = make()(resumed)
    if how == "file":
        second.load_states(tmp_path / "states.safetensors")
    else:
        second.load_state_dict(torch.load(tmp_path / "states.pt", mmap=True))
    take_steps(resumed, second, range(10, 20))
    assert bits(resumed) == bits(expected)
    assert state_bits(second) == state_bits(whole)


def test_states_stay_fp32_for_bf16_parameters() -> None:
    params, optimizer = train(partial(PagedAdamW, lr=LR), 3, torch.bfloat16)
    again = PagedAdamW(params)
    again.load_state_dict(optimizer.state_dict())
    assert state_bits(again) == state_bits(optimizer)
    narrow = torch.optim.AdamW(params)  # whose states are bfloat16
    narrow.load_state_dict(optimizer.state_dict())
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again.state_dict()["state"][0]["exp_avg"], narrow.state[params[0]]["exp_avg"].float())


def test_states_that_are_converted_are_loaded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    params, narrow = train(partial(torch.optim.AdamW, lr=LR), 2, torch.bfloat16)
    whole, by_piece = PagedAdamW(params), PagedAdamW(params)
    whole.load_state_dict(narrow.state_dict())
    sizes, load = [], by_piece._paged._load
    monkeypatch.setattr(paged_parameters, "_CHUNK", 100_000)
    monkeypatch.setattr(by_piece._paged, "_load", lambda held, file: (sizes.append(len(held)), load(held, file)))
    by_piece.load_state_dict(narrow.state_dict())
    assert sizes == [6, 8], "parts of parameters of fewer than 100 KB in all before the last"
    assert state_bits(by_piece) == state_bits(whole)


def test_hooks_see_tensors() -> None:
    _, optimizer = train(partial(PagedAdamW, lr=LR), 2)
    optimizer.load_state_dict(optimizer.state_dict())
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(type(state["state"][0]["exp_avg"])))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(type(state["state"][0]["exp_avg"])))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.Tensor, torch.Tensor]
    assert all(value is None for entry in optimizer.state.values() for value in entry.values())


def bad_state(change: Any) -> dict[str, Any]:
    state = train(partial(torch.optim.AdamW, lr=LR), 1)[1].state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].pop("exp_avg"), r"exp_avg of parameter 0: expected floats \[300, 41\], got nothing"),
        (
            lambda s: s["state"][1].update(exp_avg_sq=torch.ones(3)),
            r"exp_avg_sq of parameter 1.*\[7\], got floats \[3\]",
        ),
        (lambda s: s["state"][1].update(exp_avg=torch.ones(7, dtype=torch.uint8)), r"floats \[7\], got uint8 \[7\]"),
        (lambda s: s["state"][2].update(max_exp_avg_sq=torch.ones(1)), "no max_exp_avg_sq"),
        (lambda s: s["state"][2].update(step=torch.tensor(1.5)), "step of parameter 2: expected a whole number"),
        (lambda s: s["state"][2].update(step=torch.tensor(2.0**60)), "step of parameter 2: expected a whole number"),
        (lambda s: s["state"].update({2: None}), "state of parameter 2: expected a dict, got NoneType"),
        (lambda s: s["state"][2].update(step=10**400), "step of parameter 2: expected a whole number, got 10*$"),
        (lambda s: s["state"][2].update(step=None), "step of parameter 2: expected a whole number, got None"),
        (
            lambda s: s["state"][2].update(exp_avg=torch.ones(1000, 30, device="meta")),
            r"got floats \[1000, 30\] .*meta",
        ),
        (lambda s: s["param_groups"][0].pop("betas"), "groups of AdamW, got 'one without betas'"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad: expected False"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr: expected 0 or more, got nan"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "different number of parameter groups"),
    ],
)
def test_a_bad_state_dict_changes_nothing(change: Any, message: str) -> None:
    _, optimizer = train(partial(PagedAdamW, lr=LR), 2)
    states, groups = state_bits(optimizer), optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad_state(change))
    assert (state_bits(optimizer), optimizer.state_dict()["param_groups"]) == (states, groups)


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_bits_", [32, 8])
def test_the_file_is_safetensors_with_the_tensors_of_state_dict(state_bits_: int, tmp_path: Path) -> None:
    options = paging("half", tmp_path) | {"state_bits": state_bits_}
    _, optimizer = train(partial(PagedAdamW, lr=LR, **options), 3)
    optimizer.save_states(tmp_path / "states.safetensors")
    file = load_file(tmp_path / "states.safetensors")
    expected = {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if name != "step"
    }
    assert file.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(file[name], value), name
        assert file[name].dtype == value.dtype
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def damage(path: Path, change: str) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if change == "short":
        content = content[:-1]
    elif change == "long":
        content += b"x"
    elif change == "huge header":
        content = (1 << 60).to_bytes(8, "little") + content[8:]
    elif change == "empty":
        content = b""
    else:
        if change == "no metadata":
            del header["__metadata__"]["PagedAdamW"]
        elif change.startswith("metadata"):
            described = json.loads(header["__metadata__"]["PagedAdamW"])
            described |= json.loads(change.removeprefix("metadata"))
            header["__metadata__"]["PagedAdamW"] = json.dumps(described)
        elif change == "overlap":
            header["0.exp_avg"]["data_offsets"] = header["0.exp_avg_sq"]["data_offsets"]
        elif change == "foreign dtype":
            header["0.exp_avg"]["dtype"] = "F64"
        elif change == "other shape":
            header["0.exp_avg"]["shape"].reverse()
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        *("short", "long", "huge header", "empty", "no metadata", "overlap", "foreign dtype", "other shape"),
        *(f'metadata{{"steps": {steps}}}' for steps in BAD_STEPS),
        *('metadata{"groups": []}', 'metadata{"groups": [3]}', 'metadata{"groups": [{"betas": [1, 2, 3]}]}'),
    ],
)
def test_a_damaged_file_changes_nothing(change: str, tmp_path: Path) -> None:
    _, optimizer = train(partial(PagedAdamW, lr=LR), 3)
    optimizer.save_states(path := tmp_path / "states.safetensors")
    damage(path, change)
    other, later = train(partial(PagedAdamW, lr=LR), 1)
    states = state_bits(later)
    with pytest.raises(ValueError, match=r"PagedAdamW.load_states: .*states.safetensors: .*expected"):
        later.load_states(path)
    assert state_bits(later) == states
    set_gradients(other, 1)
    later.step()


def test_what_fails_to_load_cannot_be_used_until_it_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    params, optimizer = train(partial(PagedAdamW, lr=LR, page_bytes=4096, host_budget=0, page_file=folder / "pages"), 2)
    optimizer.save_states(tmp_path / "states")
    before, states = bits(params), state_bits(optimizer)
    (folder / "pages").unlink()
    folder.rmdir()
    with pytest.raises(OSError, match="open"):
        optimizer.load_states(tmp_path / "states")
    folder.mkdir()
    set_gradients(params, 2)
    add = partial(optimizer.add_param_group, {"params": [Parameter(torch.ones(3))]})
    for act in (optimizer.step, optimizer.state_dict, partial(optimizer.save_states, tmp_path / "states"), add):
        with pytest.raises(RuntimeError, match="could not be loaded"):
            act()
    assert bits(params) == before
    optimizer.load_states(tmp_path / "states")
    assert state_bits(optimizer) == states


def test_saving_follows_no_link_that_someone_has_laid(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "states.tmp").symlink_to(tmp_path / "precious")
    _, optimizer = train(partial(PagedAdamW, lr=LR), 1)
    optimizer.save_states(tmp_path / "states")
    assert (tmp_path / "precious").read_text() == "precious"
    optimizer.load_states(tmp_path / "states")


def test_saving_twice_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = train(partial(PagedAdamW, lr=LR), 1)
    _, other = train(partial(PagedAdamW, lr=LR), 2)
    save, expected = optimizer._paged.save, state_bits(optimizer)

    def save_beside_another(*args: Any) -> None:
        with pytest.raises(BlockingIOError, match=r"another process or thread is writing it.*states\.tmp"):
            other.save_states(tmp_path / "states")
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._paged, "save", save_beside_another)
        optimizer.save_states(tmp_path / "states")
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
    optimizer.load_states(tmp_path / "states")
    assert state_bits(optimizer) == expected
    other.save_states(tmp_path / "states")  # over one that is whole


def test_a_distributed_checkpoint_finds_the_states_as_they_are() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(8, 8)
    optimizer = PagedAdamW(model.parameters(), lr=LR)
    for _ in range(3):
        model(torch.ones(8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    states, values = state_bits(optimizer), bits(list(model.parameters()))
    got = get_optimizer_state_dict(model, optimizer)
    assert (state_bits(optimizer), bits(list(model.parameters()))) == (states, values)
    assert torch.equal(got["state"]["weight"]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_file_for_other_parameters(tmp_path: Path) -> None:
    _, optimizer = train(partial(PagedAdamW, lr=LR), 1)
    optimizer.save_states(path := tmp_path / "states.safetensors")
    with pytest.raises(ValueError, match=r"expected groups of \[1\] parameters, got \[7\]"):
        PagedAdamW([Parameter(torch.ones(3))]).load_states(path)
    with pytest.raises(ValueError, match=r"0.exp_avg: expected Form\(dtype=torch.uint8"):
        PagedAdamW(parameters(), state_bits=8).load_states(path)
    with pytest.raises(FileNotFoundError):
        optimizer.load_states(tmp_path / "none")


def test_a_file_of_another_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shards have the same shapes."""
    params, optimizer = train(partial(PagedAdamW, lr=LR), 1)
    with monkeypatch.context() as patch:
        patch.setattr(state_file, "shard_number", lambda p: 3 if p is params[1] else 0)
        optimizer.save_states(path := tmp_path / "states.safetensors")
        optimizer.load_states(path)
    states = state_bits(optimizer)
    take_steps(params, optimizer, [1])
    later = state_bits(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1: expected shard 0, as this process .*, got shard 3$"):
        optimizer.load_states(path)
    assert state_bits(optimizer) == later != states
