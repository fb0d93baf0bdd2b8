# Every target works in a fresh clone: it makes the environment that it needs first.
PYTHON ?= python3
BIN := .venv/bin
# One process a core, each with one thread; files in order, for the longest have few tests.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: install search test check slow smollm2 gemma3 embedded

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
	$(PYTEST)

slow: install
	$(PYTEST) -m slow

smollm2: install
	$(BIN)/python scripts/make_model.py smollm2-135m --out models/smollm2-135m

gemma3: install
	$(BIN)/python scripts/make_model.py gemma3-270m --out models/gemma3-270m

embedded: install
	$(BIN)/python scripts/train_embedded.py --threads 2 --out build/embedded
