"""Shared-memory bank conflicts, by instruction.

Shared memory has 32 banks of 4 bytes. An access of at most 4 bytes is served for a whole warp at once, one of 8 bytes
for half a warp, one of 16 bytes (and each 8x8 matrix of ldmatrix) for 8 lanes: these are its phases. A phase takes as
many cycles as the bank with the most distinct words has words: its degree. Lanes that touch the same word share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .kernel import Instruction


@dataclass
class BankSite:
    """degree: the worst phase; cycles / phases: the mean one, 1.0 without conflicts."""

    instruction: str
    requests: int = 0
    phases: int = 0
    cycles: int = 0
    degree: int = 0


class BankCounter:
    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.sites: dict[int, BankSite] = {}

    def count(self, addresses: Any, size: int, slots: Any, instruction: Instruction) -> None:
        """addresses: offsets in the shared memory of the thread's block."""
        if not self.enabled:
            return
        lanes = min(32, 128 // max(size, 4))
        phase = slots // lanes
        words = addresses[:, None] // 4 + np.arange(max(size // 4, 1))
        keys = np.sort(phase[:, None] << 32 | words, axis=None)
        keys = keys[np.append(True, keys[1:] != keys[:-1])]  # np.unique's hash table takes five times as long
        index = ((keys >> 32) - phase.min()) * 32 + (keys & 31)
        degrees = np.bincount(index)
        degrees = np.pad(degrees, (0, -degrees.size % 32)).reshape(-1, 32).max(axis=1)
        site = self.sites.setdefault(id(instruction), BankSite(instruction.text))
        site.requests += np.unique(slots >> 5).size
        site.phases += int((degrees > 0).sum())
        site.cycles += int(degrees.sum())
        site.degree = max(site.degree, int(degrees.max()))
