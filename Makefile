# make demo | make quick | make test | make bench | make gpu | make check | make audit | make setup
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup demo check audit quick test bench gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    the main job, end to end, on an embedded default (runs/demo/)"
	@echo "make quick   make check, then every test that needs neither Ray nor Megatron: before each commit"
	@echo "make test    make check, then every test"
	@echo "make bench   every benchmark at full size; exit status 1 where a bar is missed"
	@echo "make gpu     what a GPU can tell, in under 8 minutes; without one, at a tiny size"
	@echo "make check   lint, types, import contracts, advisories where they can be asked for"
	@echo "make audit   advisories of the versions in constraints.txt, by pip-audit where it is there"
	@echo "make setup   the environment, $(VENV), with everything for development"

setup: $(STAMP)

# torch is installed first and by itself, so that a CPU build on the machine's own wheel path is taken.
# Of trl only the chat templates are read, by tests and benchmarks: it comes without its dependencies,
# which are large.
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
	@$(BIN)/python -m tests.support.audit

audit: $(STAMP)
	@$(BIN)/python -m tests.support.audit

# `make test` has two of these going at any time, each in a process of its own: what it prints is
# shown when it ends, and one that fails ends none of the others. The processors have a process
# each: more threads would wait for one another. What Python compiles is kept: a run of the tests
# starts hundreds of processes.
LIGHT_PARTS := light-1 light-2
HEAVY_PARTS := heavy-1 heavy-2
ONE_BY_ONE  := --keep-going --output-sync --no-print-directory
unexport PYTHONDONTWRITEBYTECODE

.PHONY: $(LIGHT_PARTS) $(HEAVY_PARTS)
$(LIGHT_PARTS): light-%: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/pytest --quick --part $*/$(words $(LIGHT_PARTS))

$(HEAVY_PARTS): heavy-%: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/pytest --heavy --part $*/$(words $(HEAVY_PARTS))

quick: $(STAMP)
	@$(MAKE) --jobs=3 $(ONE_BY_ONE) check $(LIGHT_PARTS)

test: $(STAMP)
	@$(MAKE) --jobs=2 $(ONE_BY_ONE) check $(LIGHT_PARTS) $(HEAVY_PARTS)

bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py

gpu: $(STAMP)
	PYTHON=$(BIN)/python benchmarks/gpu_check.sh

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache
