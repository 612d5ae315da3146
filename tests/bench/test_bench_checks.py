"""What a bench checks before it times: each check takes the right result and refuses any other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import format_providers
import linear_providers
import lora_providers
import optimizer_paging
import optimizer_resident
from optimizer_providers import SAME, Provider
from weight import Weight

import qlora_ext

ROWS = 4
PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (linear_providers.linear, partial(linear_providers.product_case, transposed=False)),
    "dgrad": (linear_providers.dgrad, partial(linear_providers.product_case, transposed=True)),
    "lora forward": (lora_providers.forward, lora_providers.forward_case),
    "lora backward": (lora_providers.backward, lora_providers.backward_case),
}
FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize": (format_providers.quantize, format_providers.quantize_case),
    "dequantize": (format_providers.dequantize, format_providers.dequantize_case),
    "dequantize into memory": (format_providers.dequantize_out, format_providers.dequantize_case),
}


def ours(bench: str) -> tuple[Any, Callable[[str, Any], float]]:
    """Our result, and the check of a bench."""
    providers, make_case = (PRODUCTS | FORMATS)[bench]
    weight = Weight(64, 128, torch.float32)
    case = make_case(weight, ROWS if bench in PRODUCTS else None)
    provider = providers(weight)[0]
    assert not provider.is_peer
    return provider.bind(provider.make(), case.inputs)(), case.check


def with_one_wrong_value(result: Any) -> Iterator[Any]:
    """The result with the last value of one of its tensors changed, of each in turn."""
    if isinstance(result, Tensor):
        wrong = result.detach().clone()
        wrong.view(-1)[-1] += 1
        yield wrong
    elif isinstance(result, qlora_ext.QuantState):
        for absmax in with_one_wrong_value(result.absmax):
            yield replace(result, absmax=absmax)
    else:
        for place, part in enumerate(result):
            for wrong in with_one_wrong_value(part):
                yield (*result[:place], wrong, *result[place + 1 :])


@pytest.mark.parametrize("bench", PRODUCTS | FORMATS)
def test_one_wrong_value_of_ours_is_a_failure(bench: str) -> None:
    result, check = ours(bench)
    assert check("qlora_ext", result) <= (1 if bench in PRODUCTS else 0)
    wrong_results = list(with_one_wrong_value(result))
    assert len(wrong_results) == {"lora backward": 3, "quantize": 2}.get(bench, 1)
    for wrong in wrong_results:
        with pytest.raises(AssertionError, match=r"of the bound$|are not the reference's$"):
            check("qlora_ext", wrong)


@pytest.mark.parametrize("bench", [*PRODUCTS, "dequantize"])
def test_a_peer_may_round_in_its_own_way_but_not_compute_something_else(bench: str) -> None:
    result, check = ours(bench)

    def times(factor: float) -> Any:
        return tuple(part * factor for part in result) if isinstance(result, tuple) else result * factor

    assert check("peer", times(1.2)) > 0
    with pytest.raises(AssertionError, match=r"^it computes something else: 0\.3"):
        check("peer", times(1.3))


def test_an_optimizer_of_ours_that_goes_another_way_is_a_failure() -> None:
    def twice_as_fast(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, **SAME | {"lr": 2e-3})

    how = torch.float32, torch.device("cpu")
    assert optimizer_resident.checked_error(Provider("peer", 32, twice_as_fast), *how) == pytest.approx(1, rel=0.01)
    with pytest.raises(AssertionError, match="of the way off"):
        optimizer_resident.checked_error(Provider("qlora_ext", 32, twice_as_fast), *how)
    for provider in optimizer_resident.PROVIDERS[:2]:
        assert provider.is_ours
        assert optimizer_resident.checked_error(provider, *how) < 0.1


FAULTS = {
    "": "",
    "another result": "the parameters at 0% are not those at 100%",
    "too much memory": "at 100% memory grew too much",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_curve_of_paging_with_a_fault_is_a_failure(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = optimizer_paging.make

    def faulty(params: Any, settings: dict[str, Any], budget: int, *more: Any) -> Any:
        lr = settings["lr"] * (2 if fault == "another result" and budget == 0 else 1)
        return make(params, settings | {"lr": lr}, budget, *more)

    seen = count(step=2**30 if fault == "too much memory" else 0)
    monkeypatch.setattr(optimizer_paging, "make", faulty)
    monkeypatch.setattr(optimizer_paging, "anonymous_bytes", lambda: next(seen))
    how = {"device": torch.device("cpu"), "elements": 2**14, "page_bytes": 2**14, "huge_pages": "off"}
    args = argparse.Namespace(**how, seconds=0.002, burst=0.001)
    rows, failed = optimizer_paging.measure(args, tmp_path)
    assert failed == bool(fault)
    assert len(rows) == 2 * (1 if fault else len(optimizer_paging.SHARES))  # of 32 and 8 bits
    assert all(FAULTS[fault] in row["skipped"] if fault else "p50" in row for row in rows)
