# `make demo` and `make test` need Python 3.10 or newer and nothing else; each sets up .venv first if it must.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast docs lint bench-gpu

demo: $(VENV)/.demo
	$(BIN)/flashsae train

# a worker a core, eight at most; each core's worth of threads goes to one of them (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup

test: $(VENV)/.dev
	$(PYTEST)

# without the tests that take many seconds each
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow"

# links, commands and code of the README and of docs/
docs: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/docs tests/test_arguments.py -k "docs or documents"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# needs a CUDA device; measures everything, with the libraries of the extra `peers` if they are installed, and draws it
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run all
	$(BIN)/python -m benchmarks.pipeline cache auxk
	$(BIN)/python -m benchmarks.pipeline model --batch-tokens 4096 --steps 480
	$(BIN)/python -m benchmarks.many
	test -d build/activations || $(BIN)/flashsae cache --out build/activations
	$(BIN)/python -m benchmarks.trainer build/activations
	$(BIN)/python -m benchmarks.trainer build/activations --dead-after-tokens 102400
	$(BIN)/python -m benchmarks.pareto build/activations-of-sites
	if command -v ncu >/dev/null; then $(BIN)/python -m benchmarks.counters; fi
	$(BIN)/python -m benchmarks.plots

# the stamp of a set-up depends on what it was made from, so a changed pin is installed by the next call
$(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("FlashSAE needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV), once; this takes a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	@touch $@
