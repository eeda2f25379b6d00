# Every target sets itself up: a virtual environment in .venv, the versions of constraints.txt, the compiled part.
#   make demo     distil the embedded teacher, and measure the floor (noise) with the same budget
#   make test     the default tests           make lint     style, types, import order
#   make slow     long tests                  make faults   kill, full disk, damaged files    make soak     200 kills, 20 restarts
#   make bench OUT=DIR   the benches beside other libraries, JSON into DIR (runs/bench)
#   make gpu OUT=DIR     on a machine with a GPU, in nine minutes: build, tests, benches; JSON into DIR (benches/results/DEVICE)
#                        GPU_PYTHON=python3: that interpreter and the torch it has; WHEELS=DIR: what it lacks; nothing is downloaded
#                        DRY=1: the same stages on the CPU, kernels interpreted, toy sizes
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
PEERS := $(VENV)/.peers
GPU_PYTHON ?=
OUT ?=
WHEELS ?=
DRY ?=
ARGS ?=

.PHONY: help demo test lint slow faults soak bench peers gpu clean install

help:
	@sed -n '2,11s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)

$(PACKAGES): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"fastkd needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; say: make PYTHON=python3.11")'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV): this downloads torch and the other packages"
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(PIP) -C build-dir=build/cmake -e ".[test,dev]"
	@touch $@

$(INSTALLED): $(PACKAGES) CMakeLists.txt $(wildcard csrc/*)
	@rm -f $(VENV)/.installed-*
	@echo "compiling the kernels, for the CPU$$( { [ "$${FASTKD_CUDA:-}" != OFF ] && command -v nvcc >/dev/null; } && echo ' and for GPUs (nvcc is here; FASTKD_CUDA=OFF leaves those out)'): a minute or two"
	$(PIP) --no-deps -C build-dir=build/cmake -e .
	@touch $@

demo: $(INSTALLED)
	$(PY) -m fastkd demo $(ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q -n auto --dist loadfile $(ARGS)

slow: $(INSTALLED)
	$(PY) -m pytest -q -m slow $(ARGS)

faults: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q -n 2 --dist loadfile -m faults $(ARGS)

soak: $(INSTALLED)
	$(PY) -m pytest -q -m soak $(ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m mypy fastkd
	$(VENV)/bin/lint-imports

peers: $(PEERS)

# Other libraries that the benches stand beside: 90 MB, most of it OpenCV and matplotlib, which grad-cam imports.
$(PEERS): $(PACKAGES)
	$(PIP) $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')
	@touch $@

bench: $(INSTALLED) $(PEERS)
	$(PY) -m benches --out $(or $(OUT),runs/bench) $(ARGS)

GPU_PY := $(or $(GPU_PYTHON),$(PY))
gpu: $(if $(GPU_PYTHON),,$(INSTALLED))
	$(GPU_PY) -m benches.gpu $(if $(OUT),--out $(OUT)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(DRY),--dry) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
