# make demo: a bundled model quantized and compared, offline.  make test: everything that CI checks.
# Both need only Python 3.10 or newer and make; what they install goes into .venv.

PYTHON ?= python3
VENV ?= .venv
# CONSTRAINTS= installs the newest versions instead
CONSTRAINTS ?= constraints.txt
# processes of make test and make test-fast
JOBS ?= 2
# faults per room of make mutation
EACH ?= 35
# of make fuzz
SECONDS ?= 60
SEED ?= 0
# of make test-engines, such as ENGINES="mlx llamacpp"; empty: all
ENGINES ?=

# what the installed package is made of: a change installs it again
SOURCES := pyproject.toml constraints.txt README.md LICENSE $(wildcard CMakeLists.txt) \
           $(shell find src $(wildcard native) -type f -not -name '*.pyc')
INSTALL := $(VENV)/bin/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: help demo test test-fast test-engines fuzz mutation lint install clean
help:
	@echo "make demo          quantize the bundled model with six recipes and compare them, offline (about 2 minutes)"
	@echo "make test          ruff, mypy and all tests, in two processes"
	@echo "make test-fast     the tests without the slow ones, in two processes (about 2 minutes)"
	@echo "make test-engines  each engine in an environment of its own, and the tests that need it"
	@echo "make fuzz          mutated files of every kind for SECONDS=60, SEED=0: none may end in a traceback or a hang"
	@echo "make mutation      small faults put into the core, EACH=35 per room: does a test notice each? (hours)"
	@echo "make lint          ruff and mypy only"
	@echo "make clean         remove $(VENV), the engines and what tools left behind"

demo: $(VENV)/.demo
	$(OFFLINE) $(VENV)/bin/halfbyte demo

test: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadscope

test-fast: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m "not slow" -n $(JOBS)

test-engines:
	$(PYTHON) scripts/test_engines.py $(ENGINES)

fuzz: $(VENV)/.test
	$(OFFLINE) $(VENV)/bin/python -m fuzz --seconds $(SECONDS) --seed $(SEED)

mutation: $(VENV)/.test
	$(INSTALL) cosmic-ray
	$(VENV)/bin/python scripts/mutation.py --each $(EACH)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# all that the demo and the tests need
install: $(VENV)/.test

clean:
	rm -rf $(VENV) .engines build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "halfbyte needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(INSTALL) '.[transformers]'
	touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/bin/python
	$(INSTALL) '.[dev]'
	touch $@ $(VENV)/.demo
