# Every target works in a fresh clone: it makes the environment that it needs first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install search test check slow fire smollm2 embedded

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

search: install
	$(BIN)/python run_search.py

test: install
	$(MAKE) --no-print-directory check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

slow: install
	$(BIN)/python -m pytest -m slow

fire: install
	$(BIN)/python -m pytest -m fire

smollm2: install
	$(BIN)/python scripts/make_smollm2.py --out models/smollm2-135m

embedded: install
	$(BIN)/python scripts/train_embedded.py --threads 2 --out build/embedded
