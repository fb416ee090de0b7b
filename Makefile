# make demo [ARGS="key=value ..."]   train, switch to tickets and sample on the digits (see README.md)
# make demo-parallel [ARGS=...]      the same with three processes, a ticket on each
# make test [ARGS="..."]             the test suite, two files at a time, with its slowest tests; ARGS go to pytest
# make lint                          ruff (rules and format) and mypy
# make clean                         remove caches and build output; keeps .venv and runs/
#
# Each target creates .venv where it is missing, and installs again when setup.cfg or constraints.txt change.
# PYTHON chooses the interpreter that .venv is made from: make test PYTHON=python3.11

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-parallel test lint clean

demo: $(STAMP)
	$(BIN)/python examples/digits.py $(ARGS)

demo-parallel: $(STAMP)
	$(BIN)/python examples/digits.py examples/configs/digits_parallel.yaml $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 --durations-min=1 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first, alone: its pin has no local version, so that whichever build pip is configured to find is taken, or
# the one already installed; what follows finds it in place.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-input -c constraints.txt torch
	$(BIN)/python -m pip install --no-input -c constraints.txt -e '.[examples,dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
