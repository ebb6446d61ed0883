# demo: the main job on embedded data.  test: everything that must hold.  check: the static part of it.
# bench: timings beside other libraries.  docs: the site, in site/.
.PHONY: demo test check bench docs clean
.DEFAULT_GOAL := test
SHELL := /bin/bash

# Idle OpenMP threads sleep, which leaves a busy machine its processors.
export OMP_WAIT_POLICY = passive
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export NO_MKDOCS_2_WARNING = 1

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell $(name) --version >/dev/null 2>&1 && echo $(name))))
INSTALL := $(BIN)/python -m pip install -qq -c constraints.txt

# Stamps stand for what is installed; a change of what is required makes them old.
$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "onmanifold needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) -e '.[dev,docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) -e '.[bench]'
	$(INSTALL) --no-deps torchattacks
	touch $@

demo: $(VENV)/.run
	$(BIN)/onmanifold demo

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet
	PYTHON=$(BIN)/python .ci/smoke_wheel

# A process for each processor, and a thread in each: the tests are many and small.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
