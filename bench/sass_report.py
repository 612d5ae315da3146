"""What nvcc made of the CUDA kernels: registers, shared memory, and the machine code of the loops that must be fast.

No GPU is needed. A step of a fused kernel is what each iteration of its innermost loop executes; what lies behind a
branch there (fetching scales, copying x) is counted apart, and what lies around that loop is not counted. The roofline:
how many weights a clock a multiprocessor's issue, ALU, shared-memory and tensor-core rates allow, over what the GPU's
memory delivers. Below 1 the kernel cannot keep up with memory; above 1 it may. `--check` only prints, and fails if a
kernel is over its budget.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from kernel_binaries import (
    CONSTANTS,
    KERNELS,
    Binary,
    compile_kernels,
    config_constants,
    demangle,
    find_tools,
    nvcc_version,
)
from machine_code import Loop, count, hot_loop, parse

FUSED = ("linear_4bit_kernel", "linear_4bit_dgrad_kernel")
REGISTERS = 65536
# The ALU executes these at 64 lanes a clock; FFMA and IMAD have another unit.
ALU = ("PRMT", "LOP3", "SHF", "SEL", "ISETP", "IADD3", "VIADD", "LEA", "MOV", "PLOP3", "FSEL", "FSETP", "IMNMX")
SHARED = ("LDS", "LDSM", "STS")


@dataclass(frozen=True)
class Machine:
    gpu: str  # the fastest memory of this architecture
    weights_per_clock: float  # a multiprocessor's share of it, 4.127 bits a weight
    multiply_adds: int  # of mma.sync in bf16 with fp32 sums, a clock and multiprocessor; H100's reaches 0.62 of wgmma
    threads: int
    ctas: int
    shared: int  # bytes of a multiprocessor, of which each CTA costs 1 KB more than it asks for
    most_shared: int  # bytes of a CTA


MACHINES = {
    "sm_80": Machine("A100", 26, 1024, 2048, 32, 164 * 1024, 163 * 1024),
    "sm_86": Machine("3090", 13, 256, 1536, 16, 100 * 1024, 99 * 1024),
    "sm_89": Machine("4090", 6.1, 256, 1536, 24, 100 * 1024, 99 * 1024),
    "sm_90": Machine("H100", 28, 1270, 2048, 32, 228 * 1024, 227 * 1024),
}


# --- what a kernel needs ----------------------------------------------------------------------------------------------


def measure(source: Path, arch: str, binary: Binary) -> list[dict[str, Any]]:
    """A row for each kernel of a .cu file."""
    code = parse(binary.sass)
    names = demangle(list(code))
    entry = re.compile(r"\.entry (\w+)\(.*?\)(.*?)\n\{(.*?)\n\}", re.DOTALL)
    entries = {found[1]: (found[2], found[3]) for found in entry.finditer(binary.ptx)}
    dynamic = re.findall(r"\.extern \.shared .*? (\w+)\[\]", binary.ptx)
    sized = [
        name
        for mangled, name in zip(code, names, strict=True)
        if any(array in entries[mangled][1] for array in dynamic)
    ]
    constants = dict(zip(sized, config_constants(source, sized) if sized else [], strict=True))
    rows = []
    for (mangled, blocks), name in zip(code.items(), names, strict=True):
        config = constants.get(name, dict.fromkeys(CONSTANTS, 0))
        row: dict[str, Any] = {"bench": "sass", "kernel": name, "arch": arch, "nvcc": nvcc_version()}
        row["gpu_of_arch"] = MACHINES[arch].gpu
        row |= resources(mangled, binary.log, entries[mangled][0]) | config
        row["ctas_per_sm"] = ctas_per_sm(row)
        every = count(instruction for block in blocks for instruction in block.instructions)
        row |= {"instructions": every.total(), "local": every["LDL"] + every["STL"]}
        if name.split("<")[0] in FUSED:
            row |= loop_budget(hot_loop(blocks), config["column_tiles"], MACHINES[arch])
        rows.append(row)
    return rows


def resources(mangled: str, log: str, directives: str) -> dict[str, int]:
    """From what ptxas says of the kernel, and from its launch bounds in the PTX."""
    says = re.search(rf"Function properties for {mangled}\n(.*\n.*)", log)
    text = says[1] if says else ""

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    bounds: dict[str, list[int]] = {
        k: [int(v) for v in values.split(",")] for k, values in re.findall(r"\.(\w+) ([\d, ]+)", directives)
    }
    x, y, z = bounds.get("maxntid", [0, 1, 1])
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "static_shared": number(r"(\d+) bytes smem"),
        "cta_threads": x * y * z,
        "wanted_ctas": bounds.get("minnctapersm", [1])[0],
    }


def ctas_by_registers(row: dict[str, Any]) -> int:
    """Registers are given to a warp in units of 256."""
    warps, of_warp = -(-int(row["cta_threads"]) // 32), -(-32 * int(row["registers"]) // 256) * 256
    return REGISTERS // of_warp // warps if warps and of_warp else 0


def ctas_per_sm(row: dict[str, Any]) -> int:
    """How many fit into a multiprocessor."""
    machine = MACHINES[row["arch"]]
    threads, shared = int(row["cta_threads"]), int(row["static_shared"] + row["dynamic_shared"])
    if not threads or shared > machine.most_shared:
        return 0
    return min(ctas_by_registers(row), machine.ctas, machine.threads // threads, machine.shared // (shared + 1024))


def loop_budget(loop: Loop | None, column_tiles: int, machine: Machine) -> dict[str, Any]:
    """A lane's share of a step, and how many weights a clock of a multiprocessor that allows.

    An mma multiplies 16 x 16 weights, 8 a lane, with 8 columns: column_tiles of them share what was decoded once.
    """
    loop = loop or Loop([], [], 0)
    every = count(loop.every)
    certain = [i for i in loop.every if i.opcode.startswith("HMMA.16816") and i.predicate is None]
    if not certain or not column_tiles:
        return {"weights": 0}
    weights = 8 * len(certain) / column_tiles
    shared_words = sum(max(i.bytes, 4) // 4 for i in loop.every if i.name in SHARED)
    limits = {
        "issue": 128 / len(loop.every),
        "alu": 64 / max(1, sum(every[name] for name in ALU)),
        "shared": 32 / max(1, shared_words),
        "tensor": 32 * machine.multiply_adds / 2048 / len(certain),
    }
    return {
        "weights": weights,
        "every_step": dict(every),
        "sometimes": dict(count(loop.sometimes)),
        "uncertain_mma": count(loop.all)["HMMA"] - len(certain),
        "longest_step": loop.longest,
        "weights_per_clock": {name: limit * weights for name, limit in limits.items()},
        "roofline": min(limits.values()) * weights / machine.weights_per_clock,
    }


# --- the budget -------------------------------------------------------------------------------------------------------


def failures(rows: Sequence[dict[str, Any]], fused: Sequence[str] = FUSED) -> Iterator[str]:
    """What is wrong with the kernels: one line each."""
    for kernel in fused:
        for arch in dict.fromkeys(row["arch"] for row in rows):
            if not any(row["kernel"].split("<")[0] == kernel and row["arch"] == arch for row in rows):
                yield f"{kernel}, {arch}: not there"
    for row in rows:
        here = f"{row['kernel']}, {row['arch']}"
        for what in ("spill_stores", "spill_loads", "stack", "local"):
            if row[what]:
                yield f"{here}: expected no {what}, got {row[what]}"
        if not row["cta_threads"]:
            yield f"{here}: has no __launch_bounds__"
        elif ctas_by_registers(row) < row["wanted_ctas"] or not row["ctas_per_sm"]:
            shared = row["static_shared"] + row["dynamic_shared"]
            yield f"{here}: {row['cta_threads']} threads of {row['registers']} registers and {shared} bytes do not fit"
        if "weights" in row:
            yield from (f"{here}: {what}" for what in loop_failures(row))


def loop_failures(row: dict[str, Any]) -> Iterator[str]:
    if not row["weights"]:
        yield "no loop with HMMA.16816"
        return
    every, sometimes = Counter(row["every_step"]), Counter(row["sometimes"])
    if row["uncertain_mma"]:
        yield f"{row['uncertain_mma']} HMMA not in every step, or not 16816"
    for name in ("SHFL", "I2F", "I2FP", "F2F", "LDL", "STL"):
        if every[name] + sometimes[name]:
            yield f"expected no {name} in the loop, got {every[name] + sometimes[name]}"
    if row["column_tiles"] > 1 or row["small_blocks"]:
        return
    for width in (1, 2, 4):
        if number := every[f"LDG:{width}"]:
            yield f"expected global loads of 8 or 16 bytes, got {number} of {width}"
    loaded = sum(number * int(name[4:]) for name, number in every.items() if name.startswith("LDG:"))
    if loaded < row["weights"] / 2 and not any(name.startswith("LDGSTS") for name in every):
        yield f"expected {row['weights'] / 2:g} bytes of weights loaded in every step, got {loaded}"
    decode, total = every["PRMT"] + every["LDS"], every.total()
    if decode > 1.15 * row["weights"]:
        yield f"expected at most 1.15 PRMT + LDS a weight, got {decode / row['weights']:.3f}"
    # dgrad in fp16 multiplies the decoded pairs by their absmax: half an instruction a weight more.
    budget = 2.2 if row["kernel"].startswith("linear_4bit_dgrad_kernel<Config<Half") else 1.7
    if total > budget * row["weights"]:
        most = ", ".join(f"{name} {number}" for name, number in every.most_common(12))
        yield f"expected at most {budget} instructions a weight, got {total / row['weights']:.3f}: {most}"
    if row["roofline"] < 1:
        yield f"cannot keep up with the memory of {MACHINES[row['arch']].gpu}: {row['roofline']:.2f} of it"


def text(row: dict[str, Any]) -> str:
    line = f"{row['kernel']:64} {row['arch']} {row['registers']:3} registers, {row['ctas_per_sm']:2} CTAs"
    if not row.get("weights"):
        return line
    every = Counter(row["every_step"])
    decode, total = (n / row["weights"] for n in (every["PRMT"] + every["LDS"], every.total()))
    longest = row["longest_step"] / row["weights"]
    return (
        f"{line}, a weight: {decode:.3f} PRMT + LDS, {total:.2f} instructions (longest step {longest:.2f}), "
        f"roofline {row['roofline']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only print, and fail over a kernel that is over budget")
    parser.add_argument("--arch", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("sources", nargs="*", type=Path, help="CUDA files; default: all of csrc/cuda")
    args = parser.parse_args()
    if not args.check and (args.sources or args.arch != list(MACHINES)):
        parser.error("only --check takes a part of the files or architectures")
    try:
        find_tools()
    except FileNotFoundError as error:
        sys.exit(str(error))
    sources = args.sources or sorted(KERNELS.glob("*.cu"))
    parts = [(source, arch) for source in sources for arch in args.arch]
    with ThreadPoolExecutor(2) as pool:
        binaries = pool.map(compile_kernels, *zip(*parts, strict=True))
        rows = [row for part, binary in zip(parts, binaries, strict=True) for row in measure(*part, binary)]
    rows.sort(key=lambda row: (row["kernel"].split("<")[0], row["arch"], row["kernel"]))
    if args.check:
        print("\n".join(map(text, rows)))
        wrong = list(failures(rows, () if args.sources else FUSED))
        sys.exit("\n".join([*wrong, f"{len(wrong)} over budget"]) if wrong else 0)
    record.write("sass", rows, smoke=False, every_machine=True)  # the code does not depend on it


if __name__ == "__main__":
    main()
