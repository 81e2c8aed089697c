# Every target makes the environment it needs: `make demo` works in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OPS := training/_ops.so
NUM_WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-soak test-all check check-cuda test-gpu bench-gpu bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

venv: $(OPS)  ## the pinned environment in .venv, with the native ops
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "set-up: the pinned packages go into $(VENV); one or two minutes, once"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	touch $(STAMP)

$(OPS): $(STAMP) tokenization/compiler.py tokenization/build_pixels.py training/build_ops.py $(wildcard tokenization/csrc/* training/csrc/*)
	$(BIN)/tensorar build-ops || echo "set-up: without native ops a train spec needs engine.ops: reference, and the demo says how"

demo: $(OPS)  ## corpus -> Ray -> shards -> DeepSpeed -> TensorAR -> pictures and a report; rerun resumes
	$(BIN)/tensorar demo

test: $(OPS)  ## unit, parity, integration and short fault tests (minutes); NUM_WORKERS files at a time
	$(PYTEST) -n $(NUM_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(OPS)  ## kills, damage, ZeRO stages: with `make test` below 40 minutes
	$(PYTEST) -m "slow and not soak"

test-soak: $(OPS)  ## the longest ones: kill storms on S3, kills of the demo and at the other stages and dtypes
	$(PYTEST) -m soak

test-all: test test-slow test-soak  ## all of them

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-cuda: $(STAMP)  ## compile every CUDA kernel and check its resources; needs nvcc, no GPU
	$(BIN)/python tests/check_cuda.py

test-gpu: $(OPS)  ## the tests that need a CUDA device; fail without one
	REQUIRE_GPU=1 $(PYTEST) -m gpu tests/gpu

bench-gpu: $(OPS)  ## benchmarks on a CUDA device, JSON lines on stdout
	@for script in benchmarks/gpu/bench_*.py; do $(BIN)/python $$script || exit 1; done

bench: $(OPS)  ## benchmarks, JSON lines on stdout
	@for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

lock:  ## rewrite requirements.lock from pyproject.toml in a throw-away environment
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet torch==2.13.0
	.lock-venv/bin/python -m pip install --quiet '.[dev]'
	{ head -2 requirements.lock; .lock-venv/bin/python -m pip freeze --exclude tensorar | sed 's/+cpu$$//'; } >requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .lock-venv

clean:  ## remove the environment, caches and build leftovers; data/ and runs/ stay
	rm -rf $(VENV) .lock-venv build dist *.egg-info $(OPS) tokenization/_pixels.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
