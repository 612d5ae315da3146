"""What was built and which path runs: `python -m qlora_ext.info`. Put its output into a bug report."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version

import torch

from qlora_ext import _C
from qlora_ext._ops import ops


def built_for_cuda() -> bool:
    """Whether the ops run on CUDA tensors too."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(ops.linear_4bit.default.name(), "CUDA"))


def describe() -> dict[str, str]:
    """What was built and what runs, as text by name."""
    return {
        "qlora_ext": version("qlora-ext"),
        "built for": "C++ and CUDA" if built_for_cuda() else "C++ only (tensors on the CPU)",
        "compiler": _C.compiler,
        "CPU path": f"{_C.cpu_path()} (this machine runs {', '.join(_C.cpu_paths())}; set QLORA_EXT_CPU to choose)",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
    }


def main() -> None:
    """Print `describe()`."""
    argparse.ArgumentParser(prog="python -m qlora_ext.info", description=__doc__).parse_args()
    lines = describe()
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
