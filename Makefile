# Thin wrappers; the README shows the same as plain commands.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: help train test lint bench clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/%.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	touch $@

train: $(BIN)/demo.installed  ## install, and train a small DeiT on photographs of solar cells (6 to 18 minutes on 2 cores)
	$(BIN)/python -m train --recipe demo --resume auto

test: $(BIN)/test.installed lint  ## install, and run all tests
	$(BIN)/python -m pytest -n auto --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/devices

lint: $(BIN)/test.installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/test.installed  ## measure everything that this machine can measure
	$(BIN)/python -m bench --all --out runs/bench

clean:  ## remove the environment, runs and caches
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache *.egg-info
