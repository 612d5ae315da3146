"""Builds qlora_ext._C: for CUDA too, where torch has it and there is an nvcc. The metadata is in pyproject.toml.

QLORA_EXT_CUDA=0 or 1 decides it instead; CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the architectures.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
OLDEST_TORCH = re.search(r'"torch>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())[1]
TORCH_FIRST = f"qlora_ext is built against the torch that it runs with: first `pip install 'torch>={OLDEST_TORCH}'`; "
try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    raise SystemExit(f"{TORCH_FIRST}{error}") from None
# pip would build with this one, and only then install a newer one beside which the extension does not load.
if torch.__version__ < OLDEST_TORCH:
    raise SystemExit(f"{TORCH_FIRST}this one is {torch.__version__}")
# torch looks for ninja on PATH, where an environment that is not activated is not; else it compiles file by file.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])

LANGUAGE = ["-O3", "-std=c++20"]
# -ffp-contract=off: roundings are part of the storage format. -fopenmp: without it at::parallel_for is one thread.
# -fno-math-errno: else square roots are taken one by one.
# Python's own flags have -fwrapv, with which GCC spills registers in the innermost loops, and often -g, 35 MB of it.
HOST = ["-ffp-contract=off", "-fno-math-errno", "-fno-wrapv", "-g0", "-fopenmp", "-Wall", "-fvisibility=hidden"]
NVCC = ["--expt-relaxed-constexpr", "--threads=4", f"-Xcompiler={','.join(HOST)}"]


def find_toolkit() -> Path:
    """CUDA_HOME, or the package cuda-toolkit[nvcc] beside torch, or what the nvcc on PATH calls its top."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    package = Path(torch.__file__).parents[1] / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}"
    if (package / "bin/nvcc").exists() or not (nvcc := shutil.which("nvcc")):
        return package
    # Not simply the folder above it: it may be a script that calls the real one.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    if not (top := re.search(r"TOP=(.+)", dry_run.stderr)):
        raise SystemExit(f"{nvcc} does not run (QLORA_EXT_CUDA=0: build without it): {dry_run.stderr}")
    return Path(top[1]).resolve()


def choose_toolkit() -> Path | None:
    """The CUDA toolkit to build with; None for a build without CUDA."""
    wanted = os.environ.get("QLORA_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"QLORA_EXT_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return None
    if torch.version.cuda is None:
        missing = f"a torch with CUDA, which {torch.__version__} is not"
    elif ((toolkit := find_toolkit()) / "bin/nvcc").exists():
        return toolkit
    else:
        package = f"cuda-toolkit[nvcc,nvvm,crt,cccl]=={torch.version.cuda}.*"  # of CUDA 13.0, nvcc alone takes any nvvm
        missing = f"nvcc: on PATH, in CUDA_HOME/bin, or `pip install {package}`"
    if wanted == "1":
        raise SystemExit(f"QLORA_EXT_CUDA=1 needs {missing}")
    print(f"qlora_ext: building without CUDA, which needs {missing}")
    return None


def extension(toolkit: Path | None) -> Extension:
    """The extension with its CUDA sources, or without."""
    sources = [path for folder in ("cpu", "ops", "pager") for path in ROOT.glob(f"csrc/{folder}/*.cpp")]
    sources += ROOT.glob("csrc/cuda/*.cu")
    if toolkit is None:
        sources = [path for path in sources if path.suffix != ".cu" and not path.stem.endswith("_cuda")]
    names = sorted(str(path.relative_to(ROOT)) for path in sources)
    options = {"extra_compile_args": {"cxx": LANGUAGE + HOST, "nvcc": LANGUAGE + NVCC}, "extra_link_args": ["-fopenmp"]}
    if toolkit is None:
        return cpp_extension.CppExtension("qlora_ext._C", names, **options)
    cpp_extension.CUDA_HOME = str(toolkit)
    # Not through a ccache that torch finds: of several architectures it looks at one, and gives old code for others.
    os.environ.setdefault("PYTORCH_NVCC", shlex.quote(str(toolkit / "bin/nvcc")))
    version = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    nvcc = re.search(r"V([0-9]+)\.([0-9]+)[0-9.]*", version)
    default = "7.5;8.0;8.6;8.9;9.0+PTX" + (";10.0;12.0" if (int(nvcc[1]), int(nvcc[2])) >= (12, 8) else "")
    archs = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    options["define_macros"] = [("QLORA_EXT_NVCC", f'"nvcc {nvcc[0][1:]} for {archs}"')]
    built = cpp_extension.CUDAExtension("qlora_ext._C", names, **options)
    # The package has the library under no other name.
    cudart = f":libcudart.so.{torch.version.cuda.split('.')[0]}"
    built.libraries = [cudart if name == "cudart" else name for name in built.libraries]
    return built


class CopyAnew(build_py):
    """Of modules that are gone, those that an earlier build left in build/lib* do not go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "qlora_ext", ignore_errors=True)
        super().run()


class Compile(cpp_extension.BuildExtension):
    """With a word for whoever has no compiler: torch has a traceback."""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "").strip() or "c++"
        if not shutil.which(shlex.split(compiler)[0]):
            raise SystemExit(f"qlora_ext: expected a C++20 compiler, as g++ 12 (CXX names it), got no {compiler!r}")
        super().run()


toolkit = choose_toolkit()
setup(
    ext_modules=[extension(toolkit)],
    cmdclass={"build_py": CopyAnew, "build_ext": Compile},
    # What to compile again is left to ninja, which sees other flags and another torch too.
    options={"build": {"build_base": "build/cuda" if toolkit else "build"}, "build_ext": {"force": True}},
)
