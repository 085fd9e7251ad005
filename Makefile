# On a fresh machine each target does all the set-up it needs by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick bench lint clean

demo: $(VENV)/.train          ## train base, R1-Zero, SFT and R1 on the embedded task
	$(BIN)/python -m grpo_core.train

test: $(VENV)/.test           ## the whole test-suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

quick: $(VENV)/.test          ## the suite without its slow part
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow"

bench: $(VENV)/.bench         ## what the kernels save, on this machine
	$(BIN)/python -m pytest bench/ --benchmark-only

lint: $(VENV)/.test           ## format, lint, types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .benchmarks
