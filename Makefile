# `make demo` and `make test` need Python 3.10 or newer and nothing else; each sets up .venv first if it must.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INTEROP := .venv-interop
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-fast test-interop docs lint bench-gpu

demo: $(VENV)/.demo
	$(BIN)/flashsae train

# a worker a core, eight at most; each core's worth of threads goes to one of them (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup

test: $(VENV)/.dev
	$(PYTEST)

# without the tests that take many seconds each
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow"

# against the real libraries of the extra `peers`, in an environment of its own
test-interop: $(INTEROP)/.peers
	$(INTEROP)/bin/python -m pytest -q tests/interop

# links, commands and code of the README and of docs/
docs: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/docs tests/cli/test_arguments.py -k "docs or documents"

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
	$(BIN)/python -m benchmarks.inference
	test -d build/activations || $(BIN)/flashsae cache --out build/activations
	$(BIN)/python -m benchmarks.trainer build/activations
	$(BIN)/python -m benchmarks.trainer build/activations --dead-after-tokens 102400
	$(BIN)/python -m benchmarks.pareto build/activations-of-sites
	if command -v ncu >/dev/null; then $(BIN)/python -m benchmarks.counters; fi
	$(BIN)/python -m benchmarks.plots

# the stamp of a set-up depends on what it was made from, so a changed pin is installed by the next call
$(VENV)/.%: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(BIN)/python $(PIP) --constraint constraints.txt torch
	$(BIN)/python $(PIP) --constraint constraints.txt --editable ".[$*]"
	@touch $@

$(INTEROP)/.peers: pyproject.toml constraints.txt tests/interop/requirements.txt
	$(call environment,$(INTEROP))
	$(INTEROP)/bin/python $(PIP) --constraint constraints.txt torch
	$(INTEROP)/bin/python $(PIP) --no-deps --requirement tests/interop/requirements.txt
	$(INTEROP)/bin/python $(PIP) --no-deps --editable .
	@touch $@

define environment
	@$(PYTHON) -c 'import sys; sys.exit("FlashSAE needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set PYTHON=..." if sys.version_info < (3, 10) else 0)'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "setting up $(1), once; this takes a few minutes"
endef
