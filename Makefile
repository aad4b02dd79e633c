# make demo | make test | make check | make setup
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    the main job, end to end, on an embedded default (runs/demo/)"
	@echo "make test    make check, then every test"
	@echo "make check   lint, types, import contracts"
	@echo "make setup   the environment, $(VENV), with everything for development"

setup: $(STAMP)

# torch is installed first and by itself, so that a CPU build on the machine's own wheel path is taken. Of trl only the chat
# templates are read, by tests and benchmarks: without what it depends on, which is large.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "miles needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps trl
	@touch $@

demo: $(STAMP)
	$(BIN)/miles demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache
