# `make` alone lists the targets. Those that need Python make .venv first, from requirements/pins.txt.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV ?= .venv
COMPAT ?= .venv-compat
BIN := $(VENV)/bin
# Test processes at a time. One torch thread each: more threads than cores make small models many times slower.
JOBS ?= 2
PYTEST_JOBS := -n $(JOBS) --dist loadgroup
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Stamps carry a digest of what was installed, so that an environment is made again when, and only when, that changes.
digest = $(shell cat $(1) | sha256sum | cut -c1-16)
PINS := requirements/pins.txt
OVERRIDES := requirements/compat.txt
STAMP := $(VENV)/.pins-$(call digest,$(PINS))
EDITABLE := $(VENV)/.package-$(call digest,pyproject.toml $(PINS))
COMPAT_STAMP := $(COMPAT)/.pins-$(call digest,pyproject.toml $(PINS) $(OVERRIDES))

# $(call install,ENVIRONMENT,PINS): torch first, because deepspeed's build imports it.
pin = $$(grep -E '^$(1)==' $(2))
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"The pins need Python >= 3.11, but $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	rm -f $(1)/.pins-* $(1)/.package-*
	$(1)/bin/pip install -q $(call pin,pip,$(2)) $(call pin,setuptools,$(2)) $(call pin,wheel,$(2))
	$(1)/bin/pip install -q -c $(2) $(call pin,torch,$(2))
	$(1)/bin/pip install -q -r <(grep -v '^deepspeed==' $(2))
	$(1)/bin/pip install -q -c $(2) --no-build-isolation $(call pin,deepspeed,$(2))
endef

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

$(STAMP):
	$(call install,$(VENV),$(PINS))
	touch $@

$(EDITABLE): $(STAMP)
	rm -f $(VENV)/.package-*
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

.PHONY: install
install: $(EDITABLE)  ## make .venv, or bring it up to date with the pins

.PHONY: demo
demo: $(EDITABLE)  ## compare a plain and an accelerated run on real images, and write the receipt
	$(BIN)/lightning-accel compare --config examples/image_classification/plain.yaml \
	  --with examples/image_classification/accelerated.yaml --seeds 3

.PHONY: test
test: $(EDITABLE)  ## every test
	$(BIN)/pytest $(PYTEST_JOBS)

.PHONY: quick
quick: $(EDITABLE)  ## the tests that are not marked slow, in under 3 minutes
	$(BIN)/pytest $(PYTEST_JOBS) -m "not slow"

.PHONY: test-ops
test-ops: $(EDITABLE)  ## the tests of ops that DeepSpeed compiles: five minutes each the first time; needs g++ and libaio-dev
	TORCH_EXTENSIONS_DIR=$(abspath $(VENV))/torch_extensions $(BIN)/pytest -m ops tests/ops

# The checks of the conformance suite that need one device, and the tests of what only CUDA shows.
ON_CUDA := tests/cuda \
  $(addprefix tests/conformance/test_,accumulation.py datamodule.py manual.py neutral.py resume.py schedulers.py undo.py)

.PHONY: test-cuda
test-cuda: $(EDITABLE)  ## the tests on a CUDA device, with a build of torch for CUDA
	TEST_ACCELERATOR=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/pytest $(PYTEST_JOBS) -m "not ops" $(ON_CUDA)

.PHONY: lint
lint: $(EDITABLE)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(EDITABLE)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: type
type: $(EDITABLE)  ## mypy, strict
	$(BIN)/mypy

.PHONY: docs
docs: $(EDITABLE)  ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: api
api: $(EDITABLE)  ## write the snapshot of the public API again, after a change that was meant
	UPDATE_API=1 $(BIN)/pytest -q tests/test_public_api.py

.PHONY: bench
bench: $(EDITABLE)  ## every benchmark, one after another, on one thread
	for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

$(COMPAT_STAMP):
	mkdir -p $(COMPAT)
	awk -F== '/^#/ {next} NR==FNR {seen[$$1]; print; next} !($$1 in seen)' $(OVERRIDES) $(PINS) > $(COMPAT)/requirements.txt
	$(call install,$(COMPAT),$(COMPAT)/requirements.txt)
	$(COMPAT)/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

.PHONY: compat
compat: $(COMPAT_STAMP)  ## the quick tests with the oldest Lightning that is supported, in .venv-compat
	$(COMPAT)/bin/pytest $(PYTEST_JOBS) -m "not slow"

.PHONY: clean
clean:  ## remove what was built, but not the environments
	rm -rf site dist build receipts .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
