# make setup | demo | test | check | bench        (each prepares its own environment in .venv first)
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench clean

setup: $(STAMP)

# One environment for everything. reasoning-gym (the `tasks` extra) needs a C compiler; without one the rest still works.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s; set PYTHON=" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/pip install --quiet -c constraints.txt -e '.[tasks]' || echo 'warning: reasoning-gym could not be installed (C compiler?); data=chain_sum and data=gsm_symbolic are not available'
	touch $@

demo: setup
	$(BIN)/torchrun --standalone --nproc-per-node 2 -m distill.demo

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m distill.kernels.aot

# Everything BENCHMARKS.md reports that can be measured on this machine; results go to outputs/bench.
bench: setup
	$(BIN)/python -m distill.rollouts.bench --json outputs/bench/rollouts.json
	$(BIN)/python -m distill.bench --json outputs/bench/training.json

clean:
	rm -rf $(VENV) outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache
