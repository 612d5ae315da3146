"""One step of PagedAdamW: with all states in memory against other optimizers, and with a part of them in a file.

Resident: the step that users call, on one tensor (flat) or on the LoRA adapters of all linear layers of Llama-7B (lora:
448 tensors). Before anything is timed, every provider makes three steps on small parameters, which are compared with
AdamW in fp64: a wrong result of ours is a failure, one of a peer is recorded as its error. The limit is the bandwidth
of copying, measured before and after each case.

Paging: the slowdown curve, see optimizer_paging.py. Measured without huge pages for malloc: pages of states have them
anyway.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import optimizer_paging
import optimizer_resident
import options
import record
import torch

PARTS = ("resident", "paging")


def parse() -> argparse.Namespace:
    parser = options.parser(__doc__, dtype=["fp32", "bf16"], seconds=2)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    device = "auto (the default): a GPU if there is one, but for --smoke"
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=device)
    parser.add_argument("--elements", type=int, default=2**25, help="of the flat layout (default: 2^25)")
    parser.add_argument("--layout", nargs="+", choices=["flat", "lora"], default=["flat", "lora"])
    parser.add_argument("--page-bytes", type=int, help="of the curve (default: PagedAdamW's)")
    folder = "where to make the folder of page files: on a disk, not in memory (default: /var/tmp)"
    parser.add_argument("--page-file", type=Path, metavar="FOLDER", default=Path("/var/tmp"), help=folder)
    args = options.parsed(parser, burst=0.2)
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available() and not args.smoke)
    args.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if on_gpu and args.huge_pages == "both":
        args.huge_pages = "off"
    if args.smoke:
        args.elements, args.layout, args.page_bytes = 2**20, ["flat"], 2**18
    return args


def main() -> None:
    args = parse()
    if args.huge_pages == "both":
        rows, failed = options.run_with_and_without_huge_pages()
    else:
        options.enter_environment(args)
        rows, failed = optimizer_resident.measure(args) if "resident" in args.part else ([], False)
        if "paging" in args.part and args.huge_pages == "off":
            with tempfile.TemporaryDirectory(dir=args.page_file) as folder:
                more, wrong = optimizer_paging.measure(args, Path(folder))
            rows, failed = rows + more, failed or wrong
        rows = record.stamped(rows)
    record.print_rows(rows)
    if args.record:
        suffix = "_cuda" if args.device.type == "cuda" else ""
        for name in ("optimizer", "optimizer_paging"):
            if of_part := [row for row in rows if row["bench"] == name]:
                record.replace(name + suffix, of_part)
    sys.exit("bench_optimizer.py: some of it failed: see above" if failed else 0)


if __name__ == "__main__":
    main()
