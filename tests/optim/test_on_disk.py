"""The file of PagedAdamW.save_states: what is in it, whose it is, and in what order it gets to the disk."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optim_cases import GIVEN, stepped
from reference import assert_same
from torch.nn import Parameter

from qlora_ext import PagedAdamW
from qlora_ext.optim import safetensors_file, state_file, updates


def test_what_was_put_into_state_and_taken_out_is_saved_so(tmp_path: Path) -> None:
    p, optimizer = stepped()
    again = PagedAdamW([p])
    optimizer.state[p] = dict(GIVEN)
    optimizer.save_states(tmp_path / "states")
    again.load_states(tmp_path / "states")
    assert again.state_dict()["state"][0]["step"] == 7
    optimizer.state.clear()
    optimizer.save_states(tmp_path / "states")
    again.load_states(tmp_path / "states")
    assert again.state_dict()["state"] == {}


def test_the_files_names_are_loaded(tmp_path: Path) -> None:
    a, b = PagedAdamW([("a", Parameter(torch.ones(3)))]), PagedAdamW([("b", Parameter(torch.ones(3)))])
    a.save_states(tmp_path / "states")
    b.load_states(tmp_path / "states")
    assert b.param_groups[0]["param_names"] == ["a"]


def test_a_parameter_without_states_has_an_empty_entry(tmp_path: Path) -> None:
    _, optimizer = stepped()
    optimizer.add_param_group({"params": [other := Parameter(torch.ones(3))]})
    optimizer.save_states(tmp_path / "states")
    optimizer.load_states(tmp_path / "states")
    assert optimizer.state[other] == {}


def test_the_first_shards_file_is_not_another_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()
    optimizer.save_states(tmp_path / "states")
    monkeypatch.setattr(state_file, "shard_number", lambda p: 3)
    with pytest.raises(ValueError, match=r"parameter 0: expected shard 3, .*got shard 0$"):
        optimizer.load_states(tmp_path / "states")


def test_no_two_parameters_and_shards_share_their_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = set()
    hyper = (1e-3, 0.9, 0.999, 1e-8, 0.0, False)
    for shard in range(3):
        monkeypatch.setattr(updates, "shard_number", lambda p, shard=shard: shard)
        p = torch.ones(1)
        numbers |= {updates.update_of(p, p, index, hyper).number for index in range(1000)}
    assert len(numbers) == 3000


def test_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()
    order = []

    def watch(name: str, act: Any) -> None:
        def called(*args: Any) -> Any:
            order.append(name)
            return act(*args)

        monkeypatch.setattr(os, name, called)

    watch("fsync", os.fsync)
    watch("replace", os.replace)
    optimizer.save_states(tmp_path / "states")
    assert order == ["fsync", "replace"]


def test_its_space_is_reserved_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()
    saved: list[Any] = []

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(optimizer._paged, "save", lambda *args: saved.append(args))
    with pytest.raises(OSError, match=r"No space.*'.*states'"):
        optimizer.save_states(tmp_path / "states")
    assert saved == []
    assert list(tmp_path.iterdir()) == []


def test_another_takes_the_left_file_away_before_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()
    lock, first = safetensors_file.lock, []

    def taken(file: Any) -> bool:
        if not first:
            first.append(1)
            (tmp_path / "states.tmp").unlink()
        return lock(file)

    monkeypatch.setattr(safetensors_file, "lock", taken)
    optimizer.save_states(tmp_path / "states")
    optimizer.load_states(tmp_path / "states")
    assert [file.name for file in tmp_path.iterdir()] == ["states"]


def test_another_takes_the_left_files_place_before_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "states.tmp"
    left.touch()
    lock, others = safetensors_file.lock, []

    def taken(file: Any) -> bool:
        if not others:
            left.unlink()
            others.append(left.open("xb", buffering=0))
            assert lock(others[0])
        return lock(file)

    monkeypatch.setattr(safetensors_file, "lock", taken)
    with pytest.raises(BlockingIOError):
        stepped()[1].save_states(tmp_path / "states")
    assert left.exists()
    others[0].close()


def test_a_relative_page_file_is_known_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, optimizer = stepped(host_budget=0, page_file="pages")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="another file than page_file"):
        optimizer.save_states(tmp_path / "pages")


# With what each is called: the path of a file, and a state_dict.
CALLS: dict[str, Callable[[Path, Any], list[Any]]] = {
    "step": lambda path, saved: [],
    "add_param_group": lambda path, saved: [{"params": [Parameter(torch.ones(3))]}],
    "remove_param_group": lambda path, saved: [0],
    "load_state_dict": lambda path, saved: [saved],
    "save_states": lambda path, saved: [path],
    "load_states": lambda path, saved: [path],
    "release": lambda path, saved: [],
    "stats": lambda path, saved: [],
}


@pytest.mark.parametrize("method", CALLS)
def test_all_wait_for_their_turn(method: str, tmp_path: Path) -> None:
    _, optimizer = stepped()
    optimizer.save_states(path := tmp_path / "states")
    arguments = CALLS[method](path, optimizer.state_dict())
    inside, leave, done = threading.Event(), threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        leave.wait(60)

    optimizer.register_state_dict_pre_hook(hold)

    def call_it() -> None:
        getattr(optimizer, method)(*arguments)
        done.set()

    threads = [threading.Thread(target=optimizer.state_dict), threading.Thread(target=call_it)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    waited = not done.wait(0.3)
    leave.set()
    for thread in threads:
        thread.join()
    assert waited
    assert done.is_set()


def test_what_a_file_describes_is_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = stepped()
    optimizer.save_states(tmp_path / "states")
    before = optimizer.state_dict()["state"][0]
    loads = json.loads
    for said, message in (
        ({"sizes": [10**15]}, r"expected groups of \[1\] parameters, got \[10{15}\]"),
        ({"steps": {}}, r"expected tensors of parameters that have taken steps alone, got 0\.exp_avg"),
        ({"steps": {"1": 1}}, "expected a file of save_states"),
        ({"steps": {"-1": 1}}, "expected a file of save_states"),
    ):
        other = SimpleNamespace(loads=lambda text, said=said: loads(text) | said)
        with monkeypatch.context() as patch:
            patch.setattr(state_file, "json", other)
            with pytest.raises(ValueError, match=message):
                optimizer.load_states(tmp_path / "states")
        assert_same(optimizer.state_dict()["state"][0], before)


@pytest.mark.parametrize(
    "given", [None, [], {}, {"state": {}}, {"param_groups": []}, {"0.weight": torch.ones(1)}], ids=str
)
def test_what_is_no_state_dict_is_said(given: Any) -> None:
    _, optimizer = stepped()
    with pytest.raises(TypeError, match=r"PagedAdamW\.load_state_dict: state_dict: expected that of an optimizer"):
        optimizer.load_state_dict(given)
    for group in ([{}], [None], {}, None):
        with pytest.raises(TypeError, match=r"expected that of an optimizer, .*, got state \{\}, param_groups "):
            optimizer.load_state_dict({"state": {}, "param_groups": group})


def test_a_state_dict_may_be_of_other_kinds_of_dicts_and_lists() -> None:
    """As for torch's optimizers."""
    p, optimizer = stepped()
    given = optimizer.state_dict()
    again = PagedAdamW([p])
    other = UserDict(given, state=UserDict(given["state"]), param_groups=tuple(given["param_groups"]))
    again.load_state_dict(other)  # type: ignore[arg-type]
    assert_same(again.state_dict()["state"][0], given["state"][0])


def test_files_of_earlier_versions_do_not_say_their_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, optimizer = stepped()
    optimizer.save_states(tmp_path / "states")
    loads = json.loads
    old = SimpleNamespace(loads=lambda text: {key: said for key, said in loads(text).items() if key != "shards"})
    monkeypatch.setattr(state_file, "json", old)
    monkeypatch.setattr(state_file, "shard_number", lambda _: 3)
    again = PagedAdamW([p])
    again.load_states(tmp_path / "states")
    assert again.state_dict()["state"][0]["step"] == 1
