"""What a launch reports: findings, counts, traffic and bank conflicts."""

from __future__ import annotations

from dataclasses import dataclass, field

from .banks import BankSite
from .kernel import Instruction
from .traffic import Traffic

ERRORS = {
    "race-RAW": "reads what another thread wrote, no barrier between",
    "race-WAR": "overwrites what another thread read, no barrier between",
    "race-WAW": "overwrites what another thread wrote, no barrier between",
    "race-read-of-unfinished-cp.async": "reads what a cp.async that nobody waited for still writes",
    "shfl-inactive": "reads a lane that does not execute the shuffle or is not in the mask: undefined",
    "mask-lacks-caller": "the executing lane is not in its own mask",
    "divergent-barrier": "the lanes of one warp do not reach the barrier together: undefined",
    "store-collision": "threads of one step store different values to one address",
    "global-conflicting-stores": "two blocks store different values to one address",
    "unfenced-global-read": "reads what another block stored with no fence after the store",
    "ld.nc-of-written-data": "non-coherent load of memory that this launch wrote: undefined",
}
NOTES = {
    "uninit-read": "reads memory that nobody wrote",
    "global-read-of-other-blocks-write": "reads what another block stored: fine if a fence and an atomic order them",
    "mask-names-absent-lane": "the mask names lanes that exited or do not exist",
    "int-div-zero": "integer division by zero",
    "cp.async-not-waited": "the kernel ended with a cp.async that nobody waited for",
    "printf": "device printf is ignored",
}
_MEANINGS = ERRORS | NOTES
_WITHIN_WARP = "-intrawarp"  # the two threads of a race share a warp: a __syncwarp is missing


@dataclass
class Finding:
    category: str
    instruction: str
    where: str  # of the first one
    count: int = 0

    @property
    def is_error(self) -> bool:
        return self.category.removesuffix(_WITHIN_WARP) in ERRORS

    def __str__(self) -> str:
        level = "ERROR" if self.is_error else "note "
        meaning = _MEANINGS[self.category.removesuffix(_WITHIN_WARP)]
        return f"  {level} {self.category} x{self.count}: {meaning} ({self.where})   [{self.instruction}]"


class Findings(dict[tuple[str, str], Finding]):
    """One for each category and instruction."""

    def note(self, category: str, instruction: Instruction, where: str, count: int = 1) -> None:
        found = self.setdefault((category, instruction.text), Finding(category, instruction.text, where))
        found.count += count


@dataclass
class Statistics:
    threads: int = 0
    thread_instructions: int = 0
    steps: int = 0
    warp_mma: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Result:
    findings: list[Finding]
    statistics: Statistics
    traffic: dict[str, Traffic] = field(default_factory=dict)
    banks: list[BankSite] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_error]

    @property
    def categories(self) -> set[str]:
        return {finding.category for finding in self.findings}

    def report(self) -> str:
        s = self.statistics
        speed = s.thread_instructions / max(s.seconds, 1e-9) / 1e6
        head = (
            f"{s.threads} threads, {s.thread_instructions} thread-instructions, {s.steps} steps, "
            f"{s.warp_mma} warp-mma, "
            f"{s.seconds:.2f} s = {speed:.1f} M inst/s, smem {s.shared_bytes} B"
        )
        traffic = [f"  {name}: {traffic}" for name, traffic in self.traffic.items()]
        conflicts = [
            f"  bank conflicts of {site.degree}: {site.cycles} cycles in {site.phases} phases [{site.instruction}]"
            for site in self.banks
            if site.degree > 1
        ]
        return "\n".join([head, *map(str, self.findings), *traffic, *conflicts])
