# Two commands matter: `make demo` shows the whole chain, `make test` runs the suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_WORKERS ?= 2

.PHONY: demo test test-all lint clean

$(BIN)/rowscope: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quant]'
	touch $(BIN)/rowscope

$(BIN)/.dev: $(BIN)/rowscope
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quant,dev]'
	touch $@

demo: $(BIN)/rowscope
	$(BIN)/rowscope demo --resume

test: $(BIN)/.dev
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) -m 'not slow'

test-all: $(BIN)/.dev
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)

# mypy reads an installed copy: in the clone the package's folder may have any name.
lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/lint .
	MYPYPATH=build/lint $(BIN)/mypy -p rowscope

clean:
	rm -rf build dist runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
