"""Breaks the kernels, one change at a time, and shows that a test fails for each.

    python tests/cuda/mutants.py --only split.cuh --jobs 2

Each barrier, fence and wait of csrc/cuda is deleted (they are found, not listed), and each mutant of mutant_list.py is
made: in a copy of csrc, on which the tests of every kernel that includes the changed file must fail.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))  # for ptx, which finds nvcc

from library import CSRC, files_of  # noqa: E402
from mutant_list import MUTANTS, Mutant  # noqa: E402

SYNCHRONIZATION = re.compile(r"__(?:sync|threadfence)\w*(?:\(\))?|cp_async_wait<[^;]*?>\(\)")
# Of CPU time that the tests of one kernel may take: a mutant that hangs is one that they notice. Not of time on the
# clock, by which every mutant would hang on a machine that is busy enough.
SECONDS = 600
SURVIVED = "SURVIVED"


class Verdict(NamedTuple):
    text: str
    as_expected: bool


def deletions() -> list[Mutant]:
    """Each barrier, fence and wait replaced by nothing; of __syncthreads_or(last) its argument is left."""
    return [
        Mutant(path.name, "synchronization", found.group(), "", place=found.start())
        for path in sorted(CSRC.glob("cuda/*.cu*"))
        for found in SYNCHRONIZATION.finditer(path.read_text())
    ]


def mutated(mutant: Mutant) -> str:
    """The text of the file with the change."""
    text = (CSRC / "cuda" / mutant.file).read_text()
    if mutant.place is not None:
        assert text.startswith(mutant.pattern, mutant.place)
        return text[: mutant.place] + mutant.replacement + text[mutant.place + len(mutant.pattern) :]
    if (times := text.count(mutant.pattern)) != 1:
        raise ValueError(f"{mutant.file} has {times} times {mutant.pattern!r}, expected once")
    return text.replace(mutant.pattern, mutant.replacement)


def name_of(mutant: Mutant) -> str:
    text = (CSRC / "cuda" / mutant.file).read_text()
    line = text[: text.find(mutant.pattern) if mutant.place is None else mutant.place].count("\n") + 1
    change = f"{' '.join(mutant.pattern.split())} -> {' '.join(mutant.replacement.split()) or 'nothing'}"
    return f"{mutant.file}:{line} {mutant.kind}: {change}"


def kernels_with(file: str) -> list[str]:
    """The kernels that a change of this file of csrc/cuda concerns."""
    sources = sorted(CSRC.glob("cuda/*.cu"))
    return [source.stem for source in sources if file in {path.name for path in files_of(source, CSRC)}]


def judge(mutant: Mutant) -> Verdict:
    """Runs the tests on the mutant. All kernels that it concerns must notice, or none if it is an equivalent one."""
    text = mutated(mutant)
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(CSRC, csrc)
        (csrc / "cuda" / mutant.file).write_text(text)
        reasons = {kernel: why_tests_fail(kernel, csrc) for kernel in kernels_with(mutant.file)}
    survived = [kernel for kernel, reason in reasons.items() if reason is None]
    text = "; ".join(reason or f"{SURVIVED} {kernel}" for kernel, reason in reasons.items())
    if mutant.equivalent:
        same = len(survived) == len(reasons)
        return Verdict(f"equivalent: {mutant.equivalent}" if same else f"called equivalent, but: {text}", same)
    return Verdict(text, bool(reasons) and not survived)


def why_tests_fail(kernel: str, csrc: Path) -> str | None:
    """The first test of the kernel that fails, and how; None if none does."""
    limited = ["bash", "-c", f'ulimit -S -t {SECONDS}; exec "$@"', "bash"]
    command = [sys.executable, "-m", "pytest", f"tests/cuda/test_{kernel}_kernel.py", "-xq", "--tb=short"]
    env = os.environ | {"QLORA_EXT_CSRC": str(csrc), "COLUMNS": "400", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*limited, *command, "--color=no", "-p", "no:cacheprovider"],
        cwd=TESTS.parent, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == -signal.SIGXCPU:
        return f"{kernel} hangs"
    if done.returncode == 0 and " passed" in done.stdout:
        return None
    if done.returncode < 0:
        return f"{kernel} dies of signal {-done.returncode}"
    failed = re.search(r"^FAILED \S+::(\S+)(?: - (.*))?", done.stdout, re.MULTILINE)
    if failed is None or re.search(r"^E .*(RuntimeError: nvcc|CalledProcessError)", done.stdout, re.MULTILINE):
        raise RuntimeError(f"the tests of {kernel} cannot run:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    finding = re.search(r"ERROR (\S+) x\d+", done.stdout)
    return f"{failed[1]}: {finding[1] if finding else (failed[2] or 'assertion')[:60]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="the mutants of these files of csrc/cuda")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in [*deletions(), *MUTANTS] if mutant.file in (options.only or [mutant.file])]
    for kernel in sorted({kernel for mutant in mutants for kernel in kernels_with(mutant.file)}):
        if reason := why_tests_fail(kernel, CSRC):  # then it would mean nothing that they fail
            sys.exit(f"without any mutant: {reason}")

    def row(mutant: Mutant) -> bool:
        start = time.perf_counter()
        try:
            verdict = judge(mutant)
        except (ValueError, RuntimeError) as error:
            verdict = Verdict(f"BROKEN: {error}", False)
        seconds = time.perf_counter() - start
        print(
            f"{'ok ' if verdict.as_expected else 'BAD'} {seconds:4.0f} s  {name_of(mutant)}\n      {verdict.text}",
            flush=True,
        )
        return verdict.as_expected

    with ThreadPoolExecutor(options.jobs) as pool:
        good = list(pool.map(row, mutants))
    print(f"{len(mutants)} mutants, {good.count(False)} of them not as expected")
    sys.exit(0 if mutants and all(good) else 1)


if __name__ == "__main__":
    main()
