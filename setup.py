"""Builds qlora_ext._C. The metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

# -ffp-contract=off: roundings are part of the storage format. -fopenmp: without it at::parallel_for is one thread.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fopenmp", "-Wall", "-fvisibility=hidden"]


def extension() -> CppExtension:
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    headers = [*CSRC.rglob("*.h")]
    return CppExtension(
        "qlora_ext._C",
        sorted(str(path.relative_to(ROOT)) for path in sources),
        depends=sorted(str(path.relative_to(ROOT)) for path in headers),
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
