from typing import Any

from torch import Tensor

compiler: str

def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
) -> None: ...
def codebook(name: str) -> list[float]: ...
def cpu_path() -> str: ...
def cpu_paths() -> list[str]: ...
def plain_gradients(params: list[Tensor]) -> list[Tensor | None]: ...
def set_cpu_path(name: str) -> None: ...

ADAMW_BLOCK: int
MIN_PAGE_BYTES: int
NESTED_BLOCKSIZE: int

class PagedStates:
    def __init__(
        self, device: str, page_bytes: int, device_budget: int | None, host_budget: int | None, page_file: str
    ) -> None: ...
    def add(self, numels: list[int], bits: list[int]) -> list[int]: ...
    def remove(self, id: int) -> None: ...
    def steps(self, id: int) -> int: ...
    def set_steps(self, id: int, steps: int) -> None: ...
    def prepare(self, ids: list[int]) -> None: ...
    def step(
        self,
        ids: list[int],
        params: list[Tensor],
        grads: list[Tensor],
        indices: list[int],
        hypers: list[tuple[float, float, float, float, float, bool]],
        grad_scale: Tensor | None,
        stochastic_rounding: bool,
        seed: int,
    ) -> None: ...
    def save(self, places: list[tuple[int, int, Tensor | None, int]], file: int) -> None: ...
    def load(self, places: list[tuple[int, int, Tensor | None, int]], file: int) -> None: ...
    def stats(self) -> dict[str, Any]: ...
