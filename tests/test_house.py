"""The rules that hold the house up, as far as a test can enforce them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qlora_ext

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qlora_ext"
OPS = sorted(set(re.findall(r"\bqlora_ext::(\w+)", " ".join(torch._C._dispatch_get_all_op_names()))))

# Each module may import those before it; interop and finetune come last, and they alone know other libraries.
LAYERS = (  # of qlora_ext without these two; a folder's own name is its __init__.py
    *("_C", "whole_files", "_ops", "flops", "quant_state", "functional", "quant_type", "sharded", "casts"),
    *("layer_hooks", "dense_linear", "weight_4bit", "linear", "experts_autograd", "experts", "layer_names"),
    *("lora.names", "lora.adapter_table", "lora.adapted_weight", "lora.config", "lora.linear", "lora", "lora.experts"),
    *("model_layers", "model_config", "quantize"),
    *("adapters.targets", "adapters.attach", "adapters.merge", "adapters.peft_config", "adapters.peft_layout"),
    *("adapters.trained_modules", "adapters.files", "adapters.trainer_checkpoints", "adapters"),
    *("optim.in_turn", "optim.states", "optim.state_dict", "optim.checks", "optim.safetensors_file"),
    *("optim.updates", "optim.paged_parameters", "optim.state_file", "optim.paged_adamw", "optim", "", "info"),
)
ECOSYSTEM = {
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "diffusers",
    "gguf",
    "tokenizers",
    "matplotlib",
    "tqdm",
}


ABOVE = ("interop", "finetune")


def sources(*patterns: str) -> Iterator[Path]:
    """Some of each pattern: a rule about none would hold whatever is written."""
    for pattern in patterns:
        found = [path for path in ROOT.glob(pattern) if path.parent.name != "__pycache__"]  # x.cpython-311.pyc
        assert found, f"no file is a {pattern}"
        yield from found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {"qlora_ext.__init__" if alias.name == "qlora_ext" else alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_only_the_door_includes_torch() -> None:
    for path in sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.cuh"):
        includes = re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10|pybind11)/[^>"]*)', path.read_text())
        assert not includes or path.parent.name == "ops", f"{path.name} includes {includes}"


def test_codebook_values_stand_in_one_place() -> None:
    for literal in ("0.69619", "0.52507", "0.0795802", "0.0625f / 12"):
        holders = [
            path.name
            for path in sources("csrc/**/*", "qlora_ext/**/*.py")
            if path.is_file() and literal in path.read_text(errors="ignore")
        ]
        assert holders == ["codebook.h"], f"{literal} stands in {holders}"


def test_nothing_waits_for_a_whole_device_or_takes_managed_memory() -> None:
    for path in sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.cuh"):
        calls = re.findall(r"cudaDeviceSynchronize|cu(?:da)?Ctx\w*Synchronize|Managed\(", path.read_text())
        assert not calls, f"{path.relative_to(ROOT)} calls {calls}"


def test_nothing_is_named_for_what_it_is_not() -> None:
    for path in sources("csrc/**/*", "qlora_ext/**/*", "tests/**/*", "bench/**/*"):
        assert not re.search(r"util|helper|misc|common|_v\d", path.stem), path


def layer_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def test_arrows_go_down() -> None:
    modules = {layer_of(path): path for path in PACKAGE.rglob("*.py") if path.parent.name not in ABOVE}
    assert modules.keys() == set(LAYERS) - {"_C"}
    for position, layer in enumerate(LAYERS[1:], start=1):
        assert not re.search(r"^\s*from \.", modules[layer].read_text(), re.MULTILINE), layer
        for name in imports(modules[layer]):
            if name.startswith("qlora_ext."):
                parts = name.split(".")[1:]
                if parts[0] in ABOVE:
                    assert (layer, parts[0]) == ("", "interop"), layer  # NF4Config, once it is asked for
                    continue
                known = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
                imported = next((module for module in known if module in LAYERS), "")  # else a name of the package
                assert imported in LAYERS[:position], f"{layer} -> {name}"
            assert name.split(".")[0] not in ECOSYSTEM, f"{layer} imports {name}"


def test_interop_is_a_file_a_library_and_knows_no_other_command() -> None:
    for path in sources("qlora_ext/interop/*.py"):
        assert not any(name.startswith("qlora_ext.finetune") for name in imports(path)), path


@pytest.mark.parametrize("op", OPS)
def test_one_name_down_the_column(op: str) -> None:
    assert (ROOT / "tests/ops" / f"test_{op}.py").exists()


def test_tests_mirror_the_packages_and_each_file_runs_alone() -> None:
    """A test imports from its own folder or from tests/, which pytest has on its path whatever else it collects."""
    tests = ROOT / "tests"
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"ops", "bench"}
    assert folders <= {path.name for path in tests.iterdir()}
    files = [path for path in (*tests.glob("*.py"), *tests.glob("*/*.py")) if path.parent.name != "ptx"]  # a package
    folder_of = {path.stem: path.parent for path in files}
    assert len(folder_of) == len(files), "two modules of one name: whichever is imported first stands for both"
    for path in files:
        for name in imports(path):
            assert folder_of.get(name, tests) in (path.parent, tests), f"{path.relative_to(ROOT)} imports {name}"
            assert not name.startswith("test_"), f"{path.relative_to(ROOT)} imports {name}"


def test_every_public_name_is_documented() -> None:
    for name in qlora_ext.__all__:
        first, *more = (getattr(qlora_ext, name).__doc__ or "").strip().splitlines() or [""]
        assert first, name
        assert more or not first.startswith(f"{name}("), f"{name}: only the signature, which dataclass writes"


def test_defaults_stand_in_the_public_function_only() -> None:
    assert OPS
    for packet in (getattr(torch.ops.qlora_ext, op) for op in OPS):
        for schema in (getattr(packet, overload)._schema for overload in packet.overloads()):
            assert not any(argument.has_default_value() for argument in schema.arguments), schema


def test_import_needs_neither_transformers_nor_time() -> None:
    """Beyond torch's own import: under 0.3 s of this process's time, no heavy package, no network or GPU code."""
    code = (
        "import torch, sys, time; before = set(sys.modules); start = time.process_time(); import qlora_ext\n"
        "print(time.process_time() - start, sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, _, names = out.partition(" ")
    assert float(seconds) < 0.3
    assert not ECOSYSTEM & set(ast.literal_eval(names))


@pytest.mark.parametrize("name", ["portable", "nonsense"])
def test_environment_chooses_the_cpu_path(name: str) -> None:
    command = [sys.executable, "-c", "import qlora_ext; print(qlora_ext._ops._C.cpu_path())"]
    env = os.environ | {"QLORA_EXT_CPU": name}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if name == "nonsense":
        assert done.returncode != 0
        assert "QLORA_EXT_CPU: expected one of portable" in done.stderr
        assert "got 'nonsense'" in done.stderr
        assert "pip install" not in done.stderr
    else:
        assert done.stdout.strip() == name


def test_the_default_is_the_fastest_cpu_path() -> None:
    """That is the last one, but where Intel's AVX512_BF16, half as fast as its fp32, comes without AMX."""
    env = {name: value for name, value in os.environ.items() if name != "QLORA_EXT_CPU"}
    code = "from qlora_ext import _C; print(_C.cpu_path(), *_C.cpu_paths())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    path, *paths = done.stdout.split()
    cpu = Path("/proc/cpuinfo")
    intel = cpu.exists() and "GenuineIntel" in cpu.read_text()
    assert path == ("avx512" if intel and paths[-1] == "avx512_bf16" else paths[-1])
