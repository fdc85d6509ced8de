.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: help env dev quickstart lint quick unit check test nightly bench figures docs lock clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

env: .venv/.runtime  ## the environment that runs Orchard on a CPU
dev: .venv/.dev      ## and what checks and tests it

.venv/.python:
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "Python 3.11 is needed, not " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11"'
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.runtime: .venv/.python requirements/torch-cpu.txt requirements/cpu.txt pyproject.toml
	@echo "installing torch, Ray, vLLM and friends into .venv; this takes some minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements/torch-cpu.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/cpu.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/.dev: .venv/.runtime requirements/dev.txt
	@echo "installing the test tools"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/dev.txt
	@touch $@

.venv/.docs: .venv/.dev requirements/docs.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/docs.txt
	@touch $@

quickstart: env  ## the main job on synthetic data: warm start, RL with vLLM rollouts, table, report
	@$(BIN)/orchard quickstart

# Tests that need neither Ray nor vLLM run in two processes; the others share one Ray.
UNIT := not ray and not vllm and not nightly
QUICK := $(UNIT) and not slow

lint: dev  ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright -p pyproject.toml

quick: dev  ## the tests without Ray or vLLM that take less than half a second each
	@$(BIN)/pytest -q -n 2 -m "$(QUICK)"

unit: dev  ## all tests without Ray or vLLM
	@$(BIN)/pytest -q -n 2 -m "$(UNIT)"

check: dev  ## style, types and quick tests, side by side
	@$(MAKE) --no-print-directory -j 2 -O lint quick

test: lint unit  ## everything but `make nightly`
	@$(BIN)/pytest -q --durations=25 -m "not nightly and not ($(UNIT))"

nightly: dev  ## the tests that take minutes each
	@$(BIN)/pytest -q -m nightly

bench: env  ## the figures of one bench, e.g. make bench NAME=learner
	@$(BIN)/orchard bench $(NAME)

figures:  ## write docs/figures.md and the marked tables from benchmarks/results
	@$(BIN)/python -m benchmarks.shared.tables

docs: .venv/.docs  ## the documentation as a site in site/; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

LOCK := uv pip compile --quiet --python-version 3.11 --no-emit-index-url --no-header --no-annotate

lock:  ## resolve requirements/*.in anew (needs uv)
	@for kind in cpu dev docs; do \
	  $(LOCK) --excludes requirements/excludes.txt --no-emit-package torch --no-emit-package triton \
	    requirements/$$kind.in -o requirements/$$kind.txt || exit 1; \
	done
	@# A CPU build of torch, where one is configured, would win and leave the CUDA libraries out.
	@env -u UV_FIND_LINKS $(LOCK) requirements/gpu.in -o requirements/gpu.txt

clean:  ## remove the environment, run folders and caches
	@rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
