# `make demo` and `make test` need Python >= 3.10 and nothing else: both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torchvision's wheel must match torch's build, and torchmetrics imports it wherever it is found.
# Kept in a folder of its own, a wheel that does not match can break only the tests that need it.
VISION := $(VENV)/vision

# A process for each core; a file's tests share its fixtures, so they stay together.
PARALLEL ?= --numprocesses auto --dist loadfile

.PHONY: setup demo test test-all lint types clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "weft needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/weft demo

$(VISION)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps \
		--upgrade --target $(VISION) torchvision timm
	@touch $@

test: setup $(VISION)/.installed
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: setup $(VISION)/.installed
	PYTHONPATH=$(VISION) $(BIN)/python -m pytest $(PARALLEL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build demo-out
