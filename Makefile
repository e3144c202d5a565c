# `make demo` and `make test` are complete from a fresh clone: they make .venv first.
# Without a GPU, ops/constraints-cpu.txt asks for a torch that exists as a CPU build: where pip's index
# has it, that saves 3 GB of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that tests run in. Much of a test is waiting: two keep two cores busy.
WORKERS ?= 2
GPU_CHECK_ARGS ?=

BIN := $(VENV)/bin
# gpu-check needs no installation: a PYTHON that was asked for, else .venv where there is one.
GPU_PYTHON := $(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(BIN)/python,$(PYTHON))
STAMP := $(VENV)/installed
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c ops/constraints-cpu.txt)

# One thread per process unless the caller knows better: a stage is a process, and they share the cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full gpu-check lint format check clean

help:
	@echo "make demo    run a small model through two stages, with KV offloading; it stays in demo-output"
	@echo "make test    run the test suite (PYTEST_ARGS='tests/proto -x' for a part of it, WORKERS=0 for one process)"
	@echo "make lint    ruff and mypy"
	@echo "make test-full  the whole of matrices that the suite runs a part of"
	@echo "make gpu-check  right and fast on this machine's GPU? PYTHON=python3 where .venv is not used;"
	@echo "                GPU_CHECK_ARGS='--only copies' for a part, --rehearse without a GPU"
	@echo "make check   lint, then test"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove .venv and everything generated"

install: $(STAMP)

$(STAMP): pyproject.toml ops/constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing pipemax and its dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/pipemax demo --keep demo-output

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-full: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "full or not full" $(PYTEST_ARGS)

gpu-check:
	@$(GPU_PYTHON) ops/gpu_check $(GPU_CHECK_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --no-error-summary

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

check: lint test

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
