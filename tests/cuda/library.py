"""The launchers as a shared library, built of csrc/cuda and the recorder that stands in for the CUDA runtime.

nvcc compiles each .cu once, for the host and to PTX, so that the kernels' names agree; nothing here is machine code.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptx.compile import ROOT, require_nvcc, run_nvcc
from ptx.kernel import Kernel
from ptx.launch import module_of

HERE = Path(__file__).parent
CACHE = ROOT / "build" / "launchers"
# The mutation tests build from a changed copy.
CSRC = Path(os.environ.get("QLORA_EXT_CSRC", ROOT / "csrc"))
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", "-Xcompiler", "-fPIC")
LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
MEMSET = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)


class Library:
    """functions: those of shim.cpp, and qlora_set_recorder."""

    def __init__(self, csrc: Path) -> None:
        sources = [*sorted(csrc.glob("cuda/*.cu")), HERE / "shim.cpp", HERE / "recorder.cpp"]
        nvcc = require_nvcc()
        version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
        before = hashlib.sha256(version + repr(FLAGS).encode())

        def build(source: Path) -> Path:
            key = before.copy()
            for path in sorted(files_of(source, csrc), key=lambda path: path.name):
                key.update(path.read_bytes())
            return _compile(source, csrc, CACHE / f"{source.stem}.{key.hexdigest()[:16]}")

        with ThreadPoolExecutor(2) as pool:
            built = list(pool.map(build, sources))
        self.functions = ctypes.CDLL(str(_link(built)))
        self.functions.takes_fused.restype = ctypes.c_bool
        for op in ("linear_4bit", "linear_4bit_dgrad"):
            getattr(self.functions, f"{op}_workspace_bytes").restype = ctypes.c_int64
        self.functions.adamw_table_bytes.restype = self.functions.fill_adamw_table.restype = ctypes.c_int64
        self._ptx = [(folder / "ptx").read_text() for folder in built if (folder / "ptx").exists()]

    @functools.cached_property
    def ptx(self) -> dict[str, str]:
        """For each kernel, by its mangled name, the PTX of its file."""
        return {name: text for text in self._ptx for name in module_of(text).entries()}

    def kernel(self, name: str) -> Kernel:
        return module_of(self.ptx[name]).kernel(name)


def load(csrc: Path = CSRC) -> Library:
    built = _build_once(csrc)
    if isinstance(built, Exception):
        raise built
    return built


@functools.cache
def _build_once(csrc: Path) -> Library | Exception:
    """Source that nvcc refuses is refused for every test, but compiled once."""
    try:
        return Library(csrc)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return error


def files_of(source: Path, csrc: Path) -> set[Path]:
    """The file and all that it includes, but for the toolkit's: a change of another file is no reason to build it."""
    found, open_ends = {source}, [source]
    while open_ends:
        file = open_ends.pop()
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            path = next(path for folder in (file.parent, csrc) if (path := (folder / name).resolve()).exists())
            if path not in found:
                found.add(path)
                open_ends.append(path)
    return found


def _compile(source: Path, csrc: Path, target: Path) -> Path:
    """A folder with the object file, and of a .cu file the PTX: both of one run, whose names for kernels they share."""
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fresh = Path(folder) / "fresh"
        fresh.mkdir()
        keep = ("-gencode", "arch=compute_80,code=compute_80", "--keep", "--keep-dir", folder)
        run_nvcc([*FLAGS, f"-I{csrc}", *(keep if source.suffix == ".cu" else ()), "-c", source, "-o", fresh / "o"])
        for ptx in Path(folder).glob("*.ptx"):
            os.replace(ptx, fresh / "ptx")
        try:
            os.replace(fresh, target)
        except OSError:  # another process was first
            if not target.exists():
                raise
    return target


def _link(built: list[Path]) -> Path:
    key = hashlib.sha256("".join(folder.name for folder in built).encode()).hexdigest()[:16]
    library = CACHE / f"launchers.{key}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        # -Bsymbolic: the recorder is meant, even where a CUDA torch has brought the real runtime.
        objects = [folder / "o" for folder in built]
        subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic,--no-undefined", "-o", fresh, *objects], check=True)
        os.replace(fresh, library)
    return library
