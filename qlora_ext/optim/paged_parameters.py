"""The states of parameters on any devices, in pages: one store a device."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_ext import _C
from qlora_ext.optim.checks import check, in_memory
from qlora_ext.optim.state_dict import others_entries
from qlora_ext.optim.states import (
    NAMES,
    PARTS,
    Saved,
    checked_state,
    has_state,
    state_forms,
    state_width,
)
from qlora_ext.optim.updates import Update
from qlora_ext.sharded import is_sharded, like_parameter, local_shard

_CHUNK = 1 << 26  # bytes of converted states that restoring holds at once


def _gives_values(entry: Any) -> bool:
    """Whether an entry of `state` has a part of a state itself, not only its name, or is no dict."""
    if not isinstance(entry, dict):
        return True
    for name, value in entry.items():  # noqa: SIM110  any(): slow
        if value is not None and name in NAMES:
            return True
    return False


def _step_dtype() -> torch.dtype:
    """torch.optim.AdamW's: in 16 bits numbers from 2048, or 257, on would be others."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class _States(NamedTuple):
    """Those of one parameter: the store that they are in and their id there, and the shape that they are for."""

    device: torch.device
    id: int
    shape: torch.Size

    def are_for(self, local: Tensor) -> bool:
        """Whether their parameter, or its local shard, is as it was when they were made."""
        return self.shape == local.shape and self.device == local.device


class PagedParameters:
    """Pages for the states of parameters. Its options are those of PagedAdamW."""

    def __init__(
        self,
        state_bits: int,
        page_bytes: int,
        device_budget: int | None,
        host_budget: int | None,
        page_file: str | None,
    ) -> None:
        self.state_bits = state_bits
        self.page_file = page_file
        self._paging = (page_bytes, device_budget, host_budget, page_file or "")
        self._stores: dict[torch.device, _C.PagedStates] = {}
        # The page file goes at the end of the process, too, where a thread that still runs keeps the optimizer.
        weakref.finalize(self, self._stores.clear)
        self._states: dict[Tensor, _States] = {}
        self._followed: list[int] | None = None  # the parameters of the last time, by identity; None: not known
        self._half_restored = False

    def reserve(self, params: Iterable[Tensor]) -> None:
        """Make room for the states of parameters that have none yet. If it raises at a device, no parameter there has
        got any, and those that changed before their first step have lost theirs.
        """
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for p in params:
            if p in self._states and not self.steps(p) and not self._states[p].are_for(local_shard(p)):
                self.forget(p)  # as it was made larger, or moved, before its first step
            if p not in self._states:
                by_device[local_shard(p).device].append(p)
        if not by_device:
            return
        devices = {states.device for states in self._states.values()} | by_device.keys()
        for device in self._stores.keys() - devices:
            del self._stores[device]
        self._check_devices(devices)
        for device, new in by_device.items():
            store = self._stores.get(device) or _C.PagedStates(str(device), *self._paging)
            shapes = [local_shard(p).shape for p in new]
            bits = [state_width(p, self.state_bits) for p in new]
            try:
                ids = store.add([shape.numel() for shape in shapes], bits)
            except BaseException:
                del store  # which the exception would keep, with its page file, if it is new
                raise
            self._stores[device] = store
            self._followed = None  # they may go again before they are seen
            self._states |= {p: _States(device, i, shape) for p, i, shape in zip(new, ids, shapes, strict=True)}

    def follow(self, params: Sequence[Tensor], state: dict[Tensor, dict[str, Any]]) -> None:
        """Bring the pages in line with the parameters of an optimizer and its `state`, which others may have changed.

        The states of other parameters are freed, as are those that `state` has no entry for. An entry of names stands
        for what is in pages; tensors are copied into them. To be called before step() and save().
        """
        self.check_restored()
        if changed := (now := [id(p) for p in params]) != self._followed:
            check(len(set(now)) == len(now), "params", "each parameter once", "one of them twice")
        given, anew = {}, []
        for index, p in enumerate(params):
            entry = state.get(p, {})
            named = has_state(entry)
            if _gives_values(entry):
                given[p] = checked_state("PagedAdamW.state", index, p, self.state_bits, entry)
            elif named and not self.steps(p):
                raise ValueError(
                    f"PagedAdamW.state: state of parameter {index}: expected tensors, as in state_dict(), "
                    "got the names of another parameter's"
                )
            elif not named and self.steps(p):  # it was taken out
                anew.append(p)
        if changed:
            of_parameters = {key for key in state if isinstance(key, Tensor)}
            for p in (self._states.keys() | of_parameters) - set(params):
                state.pop(p, None)
                self.forget(p)
        for p in anew:
            self.forget(p)
        for p in given:
            if p in self._states and not self._states[p].are_for(local_shard(p)):
                self.forget(p)
        self.reserve(given)
        self._followed = now
        self.put(given)
        for p, saved in given.items():
            state[p] = others_entries(state[p]) | (self.names(p) if saved.steps else {})

    def names(self, p: Tensor) -> dict[str, None]:
        """What stands in an optimizer's `state` for what is in pages: torch.distributed.checkpoint looks there."""
        return dict.fromkeys(("step", *state_forms(p, self.state_bits)))

    def forget(self, p: Tensor) -> None:
        """Free the states of this parameter, if it has any."""
        if states := self._states.pop(p, None):
            self._stores[states.device].remove(states.id)

    def steps(self, p: Tensor) -> int:
        """How many steps the parameter has taken; without any it has no state."""
        states = self._states.get(p)
        return 0 if states is None else self._stores[states.device].steps(states.id)

    def step(
        self, updates: Collection[Update], grad_scale: Tensor | None, stochastic_rounding: bool, seed: int
    ) -> None:
        """Update parameters, for which there is room, page by page: all of them or none, unless pages are lost."""
        by_device: dict[torch.device, list[Update]] = defaultdict(list)
        for update in updates:
            by_device[update.local.device].append(update)
        ids = {device: [self._id(u.parameter, u.local) for u in here] for device, here in by_device.items()}
        if len(by_device) > 1:  # what can fail before a step does so on all devices before the first takes it
            for device in by_device:
                self._stores[device].prepare(ids[device])
        for device, here in by_device.items():
            _, shards, grads, numbers, hypers = map(list, zip(*here, strict=True))
            scale = None if grad_scale is None else grad_scale.to(device, torch.float32)
            self._stores[device].step(ids[device], shards, grads, numbers, hypers, scale, stochastic_rounding, seed)

    def save(self, parts: Iterable[tuple[Tensor, str, Tensor | int]], file: int = -1) -> None:
        """Copy parts of parameters' states into CPU tensors, or to offsets of a file."""
        for device, places in self._places(parts).items():
            self._stores[device].save(places, file)

    @torch.inference_mode(False)  # of which a state_dict is no part, as torch's own is none
    def entries(self, params: Iterable[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """The states of those that have taken steps, as a state_dict has them."""
        found: dict[Tensor, dict[str, Tensor]] = {}
        for p in params:
            if not self.steps(p):
                continue
            forms = state_forms(p, self.state_bits)
            whole = "exp_avg_absmax" not in forms or not is_sharded(p)
            check(whole, "state_dict", "32-bit states of sharded DTensors, or save_states()", "8-bit ones")
            found[p] = {part: torch.empty(form.shape, dtype=form.dtype, device="cpu") for part, form in forms.items()}
        self.save((p, part, value) for p, entry in found.items() for part, value in entry.items())
        for p, entry in found.items():  # which are filled by now: a DTensor may copy them to another device
            entry.update((part, like_parameter(p, entry[part])) for part in ("exp_avg", "exp_avg_sq"))
            entry["step"] = torch.tensor(float(self.steps(p)), dtype=_step_dtype(), device="cpu")
        return found

    def restore(self, saved: Mapping[Tensor, Saved], reserved: Iterable[Tensor], file: int = -1) -> None:
        """Replace all states by these, and reserve room for those of further parameters.

        If it raises for the devices or, without a page file, for want of room, all is as it was. Else states are lost:
        nothing can be done with them until this has succeeded.
        """
        wanted = dict.fromkeys([*saved, *reserved])
        self._check_devices({local_shard(p).device for p in wanted})
        keep = self.page_file is None and not self._half_restored
        before, stores = self._states, dict(self._stores)
        self._states, self._followed, self._half_restored = {}, None, True
        self._stores.clear()
        if not keep:
            stores.clear()  # a page file's room and path are for the next
        try:
            self.reserve(wanted)
        except BaseException:
            if keep:
                self._states, self._half_restored = before, False
                self._stores.clear()
                self._stores.update(stores)
            raise
        stores.clear()  # which frees all pages, before others take memory: there is never a second copy of the states
        self.put(saved, file)
        self._half_restored = False

    def put(self, saved: Mapping[Tensor, Saved], file: int = -1) -> None:
        """Replace the states of these parameters, for which there is room."""
        held: list[tuple[Tensor, str, Tensor | int]] = []
        converted = 0
        for p, (steps, parts) in saved.items():
            self._stores[self._states[p].device].set_steps(self._id(p, local_shard(p)), steps)
            for part, form in state_forms(p, self.state_bits).items():
                value = parts[part]
                if isinstance(value, Tensor):
                    given, value = value, value.detach().resolve_neg().to("cpu", form.dtype).contiguous()
                    converted += value.nbytes if value.data_ptr() != given.data_ptr() else 0
                held.append((p, part, value))
            if converted > _CHUNK:
                self._load(held, file)
                held, converted = [], 0
        self._load(held, file)

    def stats(self) -> dict[str, Any]:
        """The sums of the stores' own, since the states were last restored."""
        tiers = dict.fromkeys(("device", "host", "file"), 0)
        total: dict[str, Any] = dict.fromkeys(("pages", "bytes_read", "bytes_written"), tiers)
        total |= dict.fromkeys(("unwritten_pages", "ring_pages", "visits", "hits"), 0) | {"seconds_waited": 0.0}
        for store in self._stores.values():
            for name, value in store.stats().items():
                if isinstance(value, dict):
                    total[name] = {tier: n + total[name][tier] for tier, n in value.items()}
                else:
                    total[name] += value
        hit_rate = total["hits"] / total["visits"] if total["visits"] else 1.0
        return total | {"page_bytes": self._paging[0], "hit_rate": hit_rate}

    def _check_devices(self, devices: set[torch.device]) -> None:
        _, device_budget, _, page_file = self._paging
        if page_file and len(devices) > 1:
            raise ValueError(
                f"PagedAdamW: page_file: expected parameters on one device, got {sorted(map(str, devices))}"
            )
        if device_budget is not None and torch.device("cpu") in devices:
            raise ValueError("PagedAdamW: device_budget: expected None for states on the CPU, which host_budget is for")
        expected = "parameters with values (of a model on meta, after to_empty or loading)"
        check(torch.device("meta") not in devices, "params", expected, "one on meta")

    def _id(self, p: Tensor, local: Tensor) -> int:
        states = self._states[p]
        if not states.are_for(local):
            expected, got = f"{states.shape.numel()} elements on {states.device}", f"{local.numel()} on {local.device}"
            if (states.shape.numel(), states.device) == (local.numel(), local.device):
                expected, got = f"shape {list(states.shape)}", f"{list(local.shape)}"
            raise ValueError(f"PagedAdamW: params: expected {expected}, as when added, got {got}")
        return states.id

    def check_restored(self) -> None:
        """Raises RuntimeError after a restore() that has raised."""
        if self._half_restored:
            raise RuntimeError(
                "PagedAdamW: not usable since states could not be loaded: expected them loaded anew or a release()"
            )

    def _places(self, parts: Iterable[tuple[Tensor, str, Tensor | int]]) -> dict[torch.device, list[Any]]:
        places: dict[torch.device, list[Any]] = defaultdict(list)
        for p, part, place in parts:
            where = (in_memory(part, place), 0) if isinstance(place, Tensor) else (None, place)
            local = local_shard(p)
            places[local.device].append((self._id(p, local), PARTS.index(part), *where))
        return places

    def _load(self, parts: Iterable[tuple[Tensor, str, Tensor | int]], file: int) -> None:
        for device, places in self._places(parts).items():
            self._stores[device].load(places, file)
