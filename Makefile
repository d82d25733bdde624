# make train DATA=tiny.txt    trains a GPT on a text. `make help` lists the other targets.
#
# Every target installs what it needs into .venv, and skips what is already installed.

PYTHON ?= python3
DATA ?= tiny.txt
OUT ?= model.npz
ARGS ?=

ifeq ($(OS),Windows_NT)
VENV_BIN := .venv/Scripts
else
VENV_BIN := .venv/bin
endif
PIP := $(VENV_BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help train test oldest soak lint bench gpu gradcheck gradcheck-full parity interop mutation nvrtc data venv clean
.DEFAULT_GOAL := help

help: ## show this list
	@echo "make train DATA=tiny.txt [OUT=model.npz] [ARGS=\"--steps 500 --lr 1e-3\"]"
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 21

train: .venv/.core ## train on DATA (a path, or a name under data/), write OUT
	@data="$(DATA)"; [ -e "$$data" ] || [ ! -e "data/$$data" ] || data="data/$$data"; \
	exec bin/train "$$data" --out "$(OUT)" $(ARGS)

test: .venv/.test ## run all tests
	$(VENV_BIN)/python -m pytest -n auto

oldest: ## run all tests with the oldest versions of NumPy, threadpoolctl and tqdm that setup.py allows
	[ -d .venv-oldest ] || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/$(notdir $(VENV_BIN))/python -m pip install --quiet --disable-pip-version-check -e ".[test,oldest]"
	.venv-oldest/$(notdir $(VENV_BIN))/python -m pytest -n auto

soak: .venv/.test ## run the reliability tests at full size: kills, faults, damaged files; about ten minutes
	$(VENV_BIN)/python tests/studies/soak.py $(ARGS)

lint: .venv/.dev ## check style and types
	$(VENV_BIN)/python -m ruff check .
	$(VENV_BIN)/python -m ruff format --check .
	$(VENV_BIN)/python -m mypy

bench: .venv/.core ## time training, kernels, generation and start-up, and PyTorch if it is installed
	$(VENV_BIN)/python tests/benchmarks/bench.py $(ARGS)

gpu: .venv/.test ## run tests, benchmarks and a training run on an NVIDIA GPU; under nine minutes
	$(VENV_BIN)/python tests/benchmarks/gpu.py $(ARGS)

gradcheck: .venv/.core ## compare every gradient of a small GPT with finite differences
	$(VENV_BIN)/python -m npgpt gradcheck $(ARGS)

gradcheck-full: .venv/.test ## check every element of every operation, with 200 examples of each property
	GRADCHECK_EXAMPLES=200 $(VENV_BIN)/python -m pytest -n auto --timeout 1200 tests/engine/test_properties.py tests/engine/test_gradients.py

parity: .venv/.parity ## compare with PyTorch, and install it first
	$(VENV_BIN)/python -m pytest -n auto tests/studies/test_parity.py

interop: .venv/.test ## compare with transformers and llama.cpp, and install them first into .interop; minutes
	$(VENV_BIN)/python tests/studies/interop.py

mutation: .venv/.test ## plant bugs in backward passes, tokenizers and formats; the tests must catch every one
	$(VENV_BIN)/python tests/studies/mutation.py $(ARGS)

nvrtc: .venv/.nvrtc ## install NVIDIA's compiler, so that `make test` compiles the GPU kernels; needs no GPU

data: ## fetch tiny Shakespeare into data/ (needs a network)
	$(PYTHON) data/fetch.py

venv: .venv/.core ## install what the commands in bin/ need into .venv

clean: ## remove .venv and the caches of tests and tools
	rm -rf .venv .venv-oldest .interop .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file for each set of dependencies. A change in setup.py makes them stale.
.venv/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "npgpt needs Python 3.10 or later, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.core: .venv/.made setup.py pyproject.toml $(wildcard npgpt/kernels/native/*.c npgpt/kernels/native/*.h)
	$(PIP) -e .
	@touch $@

.venv/.test: .venv/.core
	$(PIP) -e ".[test]"
	@touch $@

.venv/.parity: .venv/.test
	$(PIP) -e ".[parity]"
	@touch $@

.venv/.nvrtc: .venv/.test
	$(PIP) -e ".[nvrtc]"
	@touch $@

.venv/.dev: .venv/.test
	$(PIP) -e ".[dev]"
	@touch $@
