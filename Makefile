# Every target sets itself up: a virtual environment in .venv, the versions of constraints.txt, the compiled part.
#   make demo     distil the embedded teacher, and measure the floor (noise) with the same budget
#   make test     the default tests           make lint     style, types, import order
#   make slow     long tests                  make faults   kill, full disk, damaged files
#   make gpu OUT=DIR     on a machine with a GPU: tests, then benches, JSON into DIR
#                        GPU_PYTHON=python3: with that interpreter and the torch it has; nothing is downloaded
#   make clean    remove what the targets made, but not runs/
# ARGS="…" is handed on to the demo, to pytest, or to the benches.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation
PACKAGES := $(VENV)/.packages
# Python files are used where they stand; what is compiled, and which files there are, makes a new (quick) installation necessary.
FILES := $(shell find fastkd benches -name '*.py' 2>/dev/null | LC_ALL=C sort | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(FILES)
GPU_PYTHON ?=
OUT ?= benches/results/gpu
ARGS ?=

.PHONY: help demo test lint slow faults gpu clean install

help:
	@sed -n '2,9s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)

$(PACKAGES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"fastkd needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; say: make PYTHON=python3.11")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV): the first time this downloads torch"
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(PIP) -C build-dir=build/cmake -e ".[test,dev]"
	@touch $@

$(INSTALLED): $(PACKAGES) CMakeLists.txt $(wildcard csrc/*)
	@rm -f $(VENV)/.installed-*
	$(PIP) --no-deps -C build-dir=build/cmake -e .
	@touch $@

demo: $(INSTALLED)
	$(PY) -m fastkd demo $(ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q -n auto --dist loadfile $(ARGS)

slow: $(INSTALLED)
	$(PY) -m pytest -q -m slow $(ARGS)

faults: $(INSTALLED)
	$(PY) -m pytest -q -m faults $(ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m mypy fastkd
	$(VENV)/bin/lint-imports

ifeq ($(strip $(GPU_PYTHON)),)
GPU_PY := $(PY)
gpu: $(INSTALLED)
else
GPU_PY := $(GPU_PYTHON)
gpu: gpu-install
.PHONY: gpu-install
gpu-install:
	$(GPU_PY) -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
endif
gpu:
	@$(GPU_PY) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else f"no GPU that torch {torch.__version__} can use: make gpu has nothing to measure here")'
	mkdir -p $(OUT)
	$(GPU_PY) -m fastkd info | tee $(OUT)/info.txt
	$(GPU_PY) -m pytest -q -m gpu
	$(GPU_PY) -m benches --out $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
