"""PagedAdamW: AdamW whose states live in pages that move between device memory, host memory and a file."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlora_ext.optim.checks import check, check_options, check_parameter, checked_hyper, parameters
from qlora_ext.optim.in_turn import in_turn
from qlora_ext.optim.paged_parameters import PagedParameters
from qlora_ext.optim.state_dict import ADAMW_GROUP, after_pre_hooks, held, let_go, others_entries, with_others_entries
from qlora_ext.optim.state_file import find_states, save_states
from qlora_ext.optim.states import Saved, checked_states
from qlora_ext.optim.updates import checked_updates


class PagedAdamW(Optimizer):
    """torch.optim.AdamW with its states in pages, so that they need not fit into the memory of the device.

    For each parameter p with gradient g, in fp32 and at step t:
    `p *= 1 - lr * weight_decay; m = lerp(m, g, 1 - beta1); v = beta2 * v + (1 - beta2) * g * g;`
    `p -= lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)`.
    Pages within the budget of the computing device stay there while steps need the same; the others stream through a
    few pages of it while others are computed. Parameters come out bit for bit the same however the states are paged.

    Args:
        params: parameters, named parameters or groups, each parameter once: float32, float16 or bfloat16, on the CPU
            or CUDA devices, with gradients of any of these dtypes. Of a DTensor, the local shard is updated.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW; also per group, as is `maximize` and nothing else.
        state_bits: 32; or 8: blocks of 256 elements with one fp32 absmax each, in the nearest codes of the dynamic
            codebooks (a second moment gets the code of 0 only if it is 0). Parameters under 4096 elements: 32 bits.
        page_bytes: size of a page, a multiple of 4096, at most 2**30.
        device_budget: bytes of memory of each CUDA device for states; None: no limit. If it does not hold all, the
            others stream through three pages of it (or three pages, if it is less).
        host_budget: bytes of host memory for the states of each device (of a CUDA device pinned, for what device_budget
            does not hold); None: no limit. If it does not hold all, the others stream through a part of it: for the CPU
            a page for each thread, at most a quarter of it but no less than two pages; for CUDA two pages. A thread
            without a page computes only what stays in memory. Bookkeeping takes 300 bytes a page beside that.
        page_file: path of a file for what the budgets do not hold, on a disk of this machine, another in each process.
            Its space, and one page, is reserved when parameters are added. Deleted at the end, it is no checkpoint.
        stochastic_rounding, seed: round bfloat16 parameters up or down by chance, so that updates smaller than half
            their last bit count on average. Chance depends on (seed, step, parameter, shard, element) alone.
        maximize: go up the gradient.

    States exist from a parameter's first gradient on. They are no tensors: `optimizer.state` has their names with None,
    `state_dict()` makes tensors of them, `save_states()` writes them without; pickling and copying raise. States put
    into `optimizer.state` are taken over at the next step, and a parameter that is removed from it begins anew. A NaN
    or Inf in a gradient makes its element NaN as in torch, with 8-bit states its block of 256; under
    torch.amp.GradScaler the whole step is skipped. An error before a step begins changes nothing. A step that loses its
    page file half-way raises, and so does every later one: some parameters are a step ahead, and a checkpoint has to be
    loaded. Several threads may use an optimizer: one waits for the other.

    Raises:
        TypeError: a parameter, gradient or option of the wrong kind.
        ValueError: an option out of range, a sparse gradient, budgets that do not hold the states without page_file, a
            page_file that is something else's file.
        OSError: page_file cannot be made, or its disk is full.

    Source: decoupled weight decay, arXiv 1711.05101; paged optimizers, QLoRA, arXiv 2305.14314, section 3; 8-bit
    states, arXiv 2110.02861.
    """

    # GradScaler leaves unscaling to step(), for which it sets grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        page_bytes: int = 1 << 20,
        device_budget: int | None = None,
        host_budget: int | None = None,
        page_file: str | os.PathLike[str] | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        check_options(
            state_bits=state_bits,
            page_bytes=page_bytes,
            device_budget=device_budget,
            host_budget=host_budget,
            page_file=page_file,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
        self._rounding = (stochastic_rounding, seed)
        file = os.path.realpath(os.fsdecode(page_file)) if page_file else None
        self._paged = PagedParameters(state_bits, page_bytes, device_budget, host_budget, file)
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        try:
            super().__init__(params, ADAMW_GROUP | own)
        except BaseException:
            self._paged.restore({}, ())  # the exception keeps this object, but not the page file
            raise

    @in_turn
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time, as to every torch optimizer; room for its states is reserved at once.

        Raises:
            TypeError, ValueError, OSError: see the class; it is then as it was, but for states of removed groups.
        """
        super().add_param_group(param_group)
        try:
            checked_hyper(self.param_groups[-1], new=True)
            new = self.param_groups[-1]["params"]
            check(len(set(new)) == len(new), "params", "each parameter once", "one of them twice")
            for p in (trained := [p for p in new if p.requires_grad]):
                check_parameter("params", p)
            self._paged.check_restored()
            try:
                self._paged.reserve(trained)
            except (ValueError, OSError):  # the states of groups that were removed may have the room
                self._follow()
                self._paged.reserve(trained)
        except BaseException:
            self.param_groups.pop()
            raise

    @in_turn
    def remove_param_group(self, index: int) -> None:
        """Remove the group at this index of `param_groups`, and its states: else these go at the next step or save.

        Raises:
            IndexError; and as `step()` does: the group is there still, but its states may be gone.
        """
        before = list(self.param_groups)
        del self.param_groups[index]
        try:
            self._follow()
        except BaseException:
            self.param_groups[:] = before
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss anew, with gradients; it is called first.

        Returns:
            What closure returned, or None.

        Raises:
            TypeError, ValueError: a gradient of the wrong kind; nothing has been updated.
            OSError, RuntimeError: the page file does not give back what was written to it; see the class.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or float(found_inf) == 0:
            self._step()
        return loss

    @in_turn
    def _step(self) -> None:
        self._follow()
        updates = list(checked_updates(self.param_groups))
        fresh = [u.parameter for u in updates if "step" not in self.state.get(u.parameter, ())]
        try:
            for p in fresh:
                self.state.setdefault(p, {}).update(self._paged.names(p))
            self._paged.reserve(fresh)
            self._paged.step(updates, getattr(self, "grad_scale", None), *self._rounding)
        except BaseException:
            for p in fresh:
                if not self._paged.steps(p):
                    self.state[p] = others_entries(self.state.get(p, {}))
            raise
        finally:  # after Ctrl-C during the step, too
            torch.autograd.graph.increment_version([u.parameter for u in updates])

    @in_turn
    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters and states, as tensors in host memory: of 32-bit states, what torch.optim.AdamW loads.

        8-bit states are uint8 codes `exp_avg` and `exp_avg_sq` in the parameter's shape, with float32 `exp_avg_absmax`
        and `exp_avg_sq_absmax` [ceil(numel / 256)]. To save without room for all of them in memory: `save_states`.
        Where hooks are registered, which may change them, they stay in memory until the next step.

        Raises:
            ValueError: 8-bit states of a sharded DTensor: the blocks of a shard are no part of a tensor's.
        """
        self._follow()
        entries = self._paged.entries(parameters(self.param_groups))
        hooked = bool(self._optimizer_state_dict_pre_hooks or self._optimizer_state_dict_post_hooks)
        names, self.state = self.state, with_others_entries(entries, self.state)
        try:
            return super().state_dict()
        finally:
            if not hooked:  # else the next step takes over what hooks have put there
                self.state = names

    @in_turn
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` of this class or of torch.optim.AdamW gave, straight into pages.

        Raises:
            TypeError, ValueError: groups or states that are not for these parameters and this state_bits; the optimizer
                is then as it was.
            ValueError for the budgets: there is no room for the states; the optimizer is then as it was.
            OSError: the page file cannot be made or written. The old states are gone then: load again, or `release()`.
        """
        with after_pre_hooks(self, state_dict) as given:
            super().load_state_dict(held(given))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what Optimizer.load_state_dict has matched to the parameters."""
        entries = let_go(state["state"])
        params = parameters(state["param_groups"])
        saved = checked_states("PagedAdamW.load_state_dict", params, self._paged.state_bits, entries)
        self._restore(saved, state["param_groups"])
        self.state = with_others_entries(self.state, entries)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "PagedAdamW: expected state_dict() or save_states(), got a call to pickle or copy it: pages cannot be"
        )

    @in_turn
    def save_states(self, path: str | os.PathLike[str]) -> None:
        """Write hyperparameters and states to a safetensors file, page by page.

        Args:
            path: of the file. It is written beside, as <path>.tmp, and renamed when it is whole. Each process of a
                sharded model writes its own shards: to a path of its own.

        Raises:
            ValueError: it is the page_file.
            BlockingIOError: another process or thread is saving there.
            OSError: it cannot be written, or the disk is full; a file that was there is as it was.
        """
        self._follow()
        where = os.path.realpath(os.fsdecode(path))
        check(where != self._paged.page_file, "save_states: path", "another file than page_file", path)
        save_states(Path(where), self.param_groups, self._paged)

    @in_turn
    def load_states(self, path: str | os.PathLike[str]) -> None:
        """Read what `save_states` wrote, straight into pages; hyperparameters become those of the file, too.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not whole, or not for these parameters and this state_bits; the optimizer is as it was.
            OSError: it cannot be read to its end, or see `load_state_dict`: the old states are gone then.
        """
        with open(path, "rb") as file:
            saved, groups = find_states(file, self.param_groups, self._paged.state_bits)
            self._restore(saved, groups, file.fileno())

    @in_turn
    def release(self) -> None:
        """Free all states, and delete the page file: at the end of a training, whoever still refers to the optimizer.
        (Trainer does until it has made the next, as with model_init.) A step after it begins anew, from zeros.
        """
        self._paged.restore({}, ())
        self.state.clear()

    @in_turn
    def stats(self) -> dict[str, Any]:
        """Where the states are and what has moved, over all devices that have parameters.

        Returns:
            pages: how many have their home in "device", "host" and "file"; unwritten_pages: how many have no home yet;
            ring_pages: of the computing devices, that others stream through; page_bytes;
            bytes_read, bytes_written: moved from and to each of these since the start or the last loading;
            visits, hits, hit_rate: pages that steps, saves and loads came to, those that were in place, their quotient;
            seconds_waited: for moves, by the calling thread; on the CPU, for streamed pages, by all threads, added up.
        """
        return self._paged.stats()

    def _restore(self, saved: dict[Tensor, Saved], groups: list[dict[str, Any]], file: int = -1) -> None:
        for group in groups:
            checked_hyper(group)
        self._paged.restore(saved, (p for p in parameters(groups) if p.requires_grad), file)
        self.state = defaultdict(dict, {p: self._paged.names(p) for p, of_p in saved.items() if of_p.steps})
        super().__setstate__({"param_groups": [ADAMW_GROUP | group for group in groups]})

    def _follow(self) -> None:
        self._paged.follow(list(parameters(self.param_groups)), self.state)
