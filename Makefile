# Everything runs in .venv, which is set up when it is missing or when pyproject.toml or constraints.txt change.
#   ARGS="dataset=miniboone solver=dopri5"   options of `make train`
#   PYTEST_ARGS="-k solver"                  options of `make test` and `make test-all`
#   PYTHON=/path/to/python3.12               interpreter of a new .venv

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.stamps/runtime
DEV := $(VENV)/.stamps/dev

SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c "$(SUPPORTED)" >/dev/null 2>&1 && echo $$p && break; done)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet)

# One thread per process: two test processes on two cores would otherwise fight for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup train test test-all lint types layers format check bench bench-gpu compare ci constraints build clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(DEV) ## Set up .venv with everything that development needs

train: $(RUNTIME) ## Set up and train; options in ARGS="dataset=... solver=..."
	$(BIN)/python -m cnf_lab.train $(ARGS)

test: $(DEV) ## Set up and run the fast tests; options in PYTEST_ARGS
	$(PYTEST) -m "not slow and not gpu and not network" $(PYTEST_ARGS)

test-all: $(DEV) ## Run the slow tests as well
	$(PYTEST) -m "not gpu and not network" $(PYTEST_ARGS)

lint: $(DEV) ## Check style, formatting and docstrings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python benchmarks/table.py --check
	! $(BIN)/pydoclint src 2>&1 | grep -E "DOC1|Traceback"

types: $(DEV) ## Check types
	$(BIN)/mypy

layers: $(DEV) ## Check that imports respect the layers
	$(BIN)/lint-imports --no-logo

format: $(DEV) ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

check: lint types layers ## Run every check that is not a test

bench: $(DEV) ## Time against the original's formulation on an idle CPU, in minutes
	$(BIN)/python benchmarks/bench.py --device cpu $(ARGS)
	$(BIN)/python benchmarks/table.py

bench-gpu: $(DEV) ## The same on a GPU
	$(BIN)/python benchmarks/bench.py --device cuda $(ARGS)
	$(BIN)/python benchmarks/table.py

compare: $(DEV) ## Give several recipes the same time on a data set: ARGS="power --minutes 10"
	$(BIN)/python benchmarks/compare.py $(ARGS)

ci: ## Do what continuous integration does
	CI=true bash .ci/run

constraints: ## Write the newest versions that fit to constraints.txt
	@python3.11 -c "$(SUPPORTED)" >/dev/null 2>&1 \
		|| { echo "Expected python3.11, whose versions install on 3.12 and 3.13 too, got none. Install it."; exit 1; }
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && set -e; \
		python3.11 -m venv "$$scratch/venv"; \
		"$$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check ".[dev]"; \
		sed -n '/^#/p' constraints.txt >"$$scratch/new"; \
		"$$scratch/venv/bin/python" -m pip freeze --all --exclude cnf-lab --exclude pip >>"$$scratch/new"; \
		cp "$$scratch/new" constraints.txt

build: $(DEV) ## Build the source archive and the wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## Remove caches and builds; .venv, data and outputs stay
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c "$(SUPPORTED)" >/dev/null 2>&1 || { echo "Expected Python 3.11, 3.12 or 3.13" \
		"with its venv module, got '$(PYTHON)'. Install one, or type PYTHON=/path/to/python3.12." >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)

# The stamps are written last, so that an installation that failed is tried again.
$(RUNTIME): pyproject.toml constraints.txt $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e .
	@mkdir -p $(@D) && touch $@

$(DEV): pyproject.toml constraints.txt $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	@mkdir -p $(@D) && touch $@ $(RUNTIME)
