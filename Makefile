# `make demo` shows everything once, for real; `make test` passes the tests. Each sets up all it needs in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
PARALLEL ?= --numprocesses auto --maxprocesses 4
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow style quality cards clean

demo: $(READY)
	$(BIN)/hf-merge demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(READY)
	$(BIN)/python -m pytest $(PARALLEL)

style: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py tests/test_public_names.py

# Renders model_cards/ anew from a real run of the demo.
cards: $(READY)
	$(BIN)/hf-merge demo --cards model_cards

# torch goes first and alone: as a dependency of the others, pip may pick the newest build with gigabytes of CUDA packages.
$(READY): setup.cfg pyproject.toml hf_merge/demo/packages.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0 || $(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --requirement hf_merge/demo/packages.txt
	touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
