# make demo and make test need Python 3.11 or 3.12 with venv, a C++ compiler and some disk; they say what is missing.
# Another interpreter: make test PYTHON=python3.12
SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
# Files of tests that run at a time: 2 suit 2 cores and 8 GiB.
WORKERS := 2
export PYTHON

.PHONY: help demo test sweep lint format setup lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: setup  ## the whole job on the committed sample: preprocess, train, kill, resume, evaluate, export, report
	@$(BIN)/maskclip demo build/demo

test: lint  ## lint, then every test
	@echo "== pytest"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

sweep: setup  ## kill training at every point of a save and at 200 random moments, and compare to the bit (minutes)
	@$(BIN)/python -m benchmarks.kill_sweep

lint: setup  ## ruff check, ruff format --check, pyright
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: setup  ## rewrite the sources with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup:  ## the virtual environment in .venv, from requirements/lock.txt
	@bash requirements/setup.sh $(VENV)

lock:  ## resolve setup.py anew into requirements/lock.txt
	@bash requirements/lock.sh

clean:  ## remove .venv, build and caches
	@rm -rf $(VENV) build dist maskclip.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
