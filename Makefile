# Every target makes what it needs in $(VENV); stamp files in there keep a second call fast.
# All paths are relative, so the working directory may have spaces in its name.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check bench clean distclean

VENV ?= .venv
# the Python to make $(VENV) with; empty = python3 if it is 3.11-3.13, else the newest of those
PYTHON ?=
# a package index with CPU builds of torch; empty = your default index (several GB of CUDA packages)
TORCH_INDEX ?=
# ARGS="--segments 8" for demo, ARGS="-k psana -x" for test, ARGS="--help" ...
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard xfel_classify/native/*.cpp xfel_classify/native/*.h xfel_classify/native/*.hpp)

# prints the requirements of the named extras: installing them by `-e .[...]` would compile again
EXTRAS := import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(r for name in sys.argv[1:] for r in extras[name]), sep="\n")

help:
	@echo "make demo    simulate run 95, analyse it with psana2 under mpirun, compare with the truth"
	@echo "make test    every check and test (psana, mpirun and torch ones included)"
	@echo "make check   ruff, mypy, import-linter"
	@echo "make bench   the side-by-side measurements of benchmarks/"
	@echo "make clean   remove what was built, keep $(VENV); make distclean removes that too"
	@echo "Options: ARGS=\"...\" for the program that is run, PYTHON=..., VENV=..., TORCH_INDEX=..."

$(VENV)/.made: .ci/venv
	@PYTHON="$(PYTHON)" .ci/venv $(VENV)
	@touch $@

# The project as an editable install, with psana where it can be built.
$(VENV)/.installed: $(VENV)/.made $(BUILD_INPUTS)
	@echo "== installing xfel_classify with psana and mpi4py (a few minutes the first time)"
	@if $(PIP) -e '.[psana]' > $(VENV)/psana.log 2>&1; then \
		echo yes > $(VENV)/.psana; \
	else \
		echo "== psana could not be installed here (the reason is at the end of $(VENV)/psana.log);"; \
		echo "== it needs Kerberos headers, an MPI and a compiler. Going on with HDF5 runs."; \
		rm -f $(VENV)/.psana; \
		$(PIP) -e '.[mpi]' >> $(VENV)/psana.log 2>&1 || $(PIP) -e .; \
	fi
	@touch $@

install: $(VENV)/.installed

$(VENV)/.tested: $(VENV)/.installed
	@if [ ! -e $(VENV)/.psana ]; then \
		echo "== the tests need psana; see the end of $(VENV)/psana.log:"; tail -n 5 $(VENV)/psana.log; exit 1; \
	fi
	@echo "== installing torch and the tools of the tests (TORCH_INDEX=... chooses where torch comes from)"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") torch
	@$(BIN)/python -c '$(EXTRAS)' learn images test check > $(VENV)/extras.txt
	$(PIP) -r $(VENV)/extras.txt
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/xfel-classify demo $(ARGS)

check: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.tested
	@for script in benchmarks/*.py; do \
		[ -e "$$script" ] || { echo "no benchmarks yet"; break; }; \
		echo "== $$script"; $(BIN)/python "$$script" $(ARGS); \
	done

clean:
	rm -rf build dist demo ./*.egg-info xfel_classify/native/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	rm -f $(VENV)/.installed $(VENV)/.tested

distclean: clean
	rm -rf $(VENV)
