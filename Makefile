# Everything a newcomer types. `make help` lists the targets; every target does its own set-up.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench chaos clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## See it work: sample footage through the whole system (minutes, no configuration)
	$(BIN)/maskwatch demo --out demo-output

# Four test processes on two cores, because most tests wait for other processes. One process per file, because the tests
# of a file share fixtures that are slow to make. In collection order, because the slow files come first in it.
test: $(VENV)/.test  ## Run the tests, against a real Postgres, Redis and S3 server
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test  ## Put the sources into the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.test  ## Measure end to end, video, and every model in every runtime (half an hour to an hour); figures go into docs/performance.md
	$(BIN)/python -m pytest -m bench
	$(BIN)/python -m benchmarks.end_to_end
	$(BIN)/python -m benchmarks.video
	$(BIN)/python -m benchmarks.tracking
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.discover
	$(BIN)/python -m benchmarks.dispatch
	$(BIN)/python -m benchmarks.lanes
	$(BIN)/python -m benchmarks.ledger
	$(BIN)/python -m benchmarks.ledger_size
	$(BIN)/python -m benchmarks.migration
	$(BIN)/python -m benchmarks.summaries
	$(BIN)/python -m benchmarks.estimate

chaos: $(VENV)/.test  ## Kill and cut off every service, and count what is lost: the table of docs/reliability.md (an hour)
	$(BIN)/python -m pytest -m chaos
	$(BIN)/python -m tests.chaos

clean:  ## Stop and remove everything that the targets above made
	-[ -x $(BIN)/maskwatch ] && MASKWATCH_STATE_DIR=demo-output/state $(BIN)/maskwatch local down --purge
	-[ -x $(BIN)/maskwatch ] && $(BIN)/maskwatch local down --purge
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The layers of pyproject.toml are installed once, and again when that file changes. The demo needs neither TensorFlow nor torch.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[worker,local]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev,train]'
	@touch $@ $(VENV)/.demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Maskwatch needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
