# decoct: `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast lint type bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	touch $(READY)

demo: $(READY)  ## compress the demo model end to end and print a before/after table
	$(BIN)/python demo/demo.py

test: $(READY)  ## every test, the slow end-to-end ones included
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: $(READY)  ## without the end-to-end tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not e2e'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)
	$(BIN)/mypy

bench: $(READY)  ## the quality table of bench/spine.md; resumable (needs the testbed model, see bench/README.md)
	$(BIN)/python bench/spine.py

clean:
	rm -rf $(VENV) demo/out
