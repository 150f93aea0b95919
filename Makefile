# Every target works on a fresh machine with Python >= 3.10 and make, with or without a GPU: it makes its own
# environment first, in .venv or in the folder that VENV= names. Paths are relative, so the name of the checkout may
# have spaces (torch.compile for the CPU then needs a VENV without).

PYTHON ?= python3
TORCH ?=
# nproc counts the cores this process may use; it would also obey OMP_NUM_THREADS, which is about threads of a worker.
CORES := $(shell unset OMP_NUM_THREADS OMP_THREAD_LIMIT; nproc 2>/dev/null || getconf _NPROCESSORS_ONLN || echo 2)
# More than 8 workers cost more memory (each loads torch) than they save time.
JOBS ?= $(shell [ $(CORES) -gt 8 ] && echo 8 || echo $(CORES))
ARGS ?=

VENV := .venv$(if $(TORCH),-$(TORCH))
STAMP := $(VENV)/.resnet-triton-installed
PY := $(VENV)/bin/python

# Settings of the caller that would leak other packages into .venv, send the installation elsewhere, or change what
# the tests run.
unexport PYTHONPATH PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSTARTUP PYTHONINSPECT PYTHONPLATLIBDIR
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_NO_DEPS PIP_DRY_RUN PIP_REQUIREMENT PIP_EDITABLE PIP_PYTHON PIP_PRE
unexport PIP_CONSTRAINT PIP_IGNORE_INSTALLED PIP_NO_BUILD_ISOLATION PIP_REPORT PIP_LOG
unexport VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_PYTHON_EXE __PYVENV_LAUNCHER__
unexport TRITON_INTERPRET PYTEST_DISABLE_PLUGIN_AUTOLOAD PYTEST_PLUGINS
export PIP_USER := 0
export PYTHONNOUSERSITE := 1
export PYTHONUTF8 := 1

# Without a writable home, caches go into the checkout.
ifneq ($(shell [ -n "$$HOME" ] && [ -d "$$HOME" ] && [ -w "$$HOME" ] && echo yes),yes)
export TRITON_HOME ?= $(CURDIR)/.cache
export XDG_CACHE_HOME ?= $(CURDIR)/.cache
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export PIP_NO_CACHE_DIR := 1
endif
# torch.compile names its cache after the user; a container may run under a number that has no name.
ifeq ($(shell id -un >/dev/null 2>&1 && echo yes),)
export USER ?= uid$(shell id -u)
endif

# Non-empty where a finished environment does not fit any more: the checkout moved, or PYTHON= names another version.
STALE := $(shell PYTHON="$(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON))" \
	sh tools/setup_env.sh stale "$(VENV)" "$(STAMP)")

.DEFAULT_GOAL := help
.PHONY: help env test bench check codegen format clean distclean check-python print-env FORCE

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.11] [TORCH=latest] [VENV=folder] [JOBS=$(JOBS)] [ARGS='pytest options']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s%s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## make the environment (.venv; .venv-latest with TORCH=latest)

test: $(STAMP) ## run all tests: compiled, interpreted and code generation, each in its own process
	@"$(PY)" tools/run_tests.py --jobs $(JOBS) -- $(ARGS)

bench: $(STAMP) ## run the bench; with a GPU it measures it
	@"$(PY)" -m pytest bench/ $(ARGS)

check: $(STAMP) ## lint, format check and types
	@status=0; \
	"$(PY)" -m ruff check . || status=1; \
	"$(PY)" -m ruff format --check . || status=1; \
	"$(PY)" -m mypy || status=1; \
	exit $$status

format: $(STAMP) ## let ruff fix and format the code
	@"$(PY)" -m ruff check --fix . ; "$(PY)" -m ruff format .

codegen: $(STAMP) ## compile every kernel for each architecture, check it, print the table and what changed
	@status=0; \
	"$(PY)" tools/run_tests.py --jobs $(JOBS) --only codegen -- $(ARGS) || status=1; \
	"$(PY)" -m resnet_triton.aot --diff || status=1; \
	exit $$status

clean: ## remove build products and caches, keep the environments
	rm -rf build dist *.egg-info .cache .benchmarks .pytest_cache .ruff_cache .mypy_cache
	find . -name '.venv*' -prune -o -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .venv-latest too
	rm -rf .venv .venv-latest

check-python: ## can this PYTHON make the environment?
	@PYTHON="$(PYTHON)" sh tools/setup_env.sh check

print-env: ## print the settings that the targets run with
	@echo "PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) STALE=$(STALE)"
	@env | grep -E '^(PYTHON|PIP_|TRITON|XDG_CACHE|MPLCONFIG|VIRTUAL_ENV|CONDA|USER=)' | sort

# The stamp is written last: an environment without one is unfinished, and is made again or completed.
$(STAMP): pyproject.toml constraints.txt tools/setup_env.sh resnet_triton/_version.py $(if $(STALE),FORCE)
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh tools/setup_env.sh install "$(VENV)" "$(STAMP)"

FORCE:
