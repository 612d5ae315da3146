"""What was built and which path runs: `python -m qlora_ext.info`. Put its output into a bug report."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version

import torch

from qlora_ext import _C


def ops_without_cuda() -> list[str]:
    """The ops that do not run on CUDA tensors: all of them in a build without CUDA, else none."""
    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qlora_ext::")}
    return [name for name in sorted(ops) if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]


def built_for_cuda() -> bool:
    """Whether every op runs on CUDA tensors too."""
    return not ops_without_cuda()


def runs_on(device: str) -> bool:
    """Whether this build has code for the device, of a type that it is built for: another GPU may need other code."""
    try:
        torch.ops.qlora_ext.quantize_4bit(torch.empty(64, device=device), "nf4", 64)
    except RuntimeError as error:
        if any(name in str(error) for name in ("cudaErrorNoKernelImageForDevice", "cudaErrorUnsupportedPtxVersion")):
            return False
        raise
    return True


def gpu() -> str:
    """The GPU that torch uses by default."""
    if not torch.cuda.is_available():
        return "none that torch can use"
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    try:
        return name if not built_for_cuda() or runs_on("cuda") else f"{name}, for which this build has no code"
    except RuntimeError as error:
        return f"{name}, where an op fails: {error}"


def describe() -> dict[str, str]:
    """What was built and what runs, as text by name."""
    return {
        "qlora_ext": version("qlora-ext"),
        "built for": "C++ and CUDA" if built_for_cuda() else "C++ only (tensors on the CPU)",
        "compiler": _C.compiler,
        "CPU path": f"{_C.cpu_path()} (this machine runs {', '.join(_C.cpu_paths())}; set QLORA_EXT_CPU to choose)",
        "threads": str(torch.get_num_threads()),
        "GPU": gpu(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
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
