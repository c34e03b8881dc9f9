# `make` prints what there is. Everything runs in .venv, which is made on first use.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
STORE ?= runs
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# One thread a process: tests and Ray workers share the cores. No usage statistics from tests. Groups of tests may run
# side by side (make -j): each Ray has ports and folders of its own. So each says which one it is, and Ray's workers do
# not give way to the others (Ray starts them with niceness 15).
TEST = @echo "== make $@"; \
	OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 $(BIN)/python -m pytest
# A target a file of tests/chaos; `test-chaos-elsewhere` are those beside the tests of what they kill.
CHAOS := $(patsubst tests/chaos/test_%.py,test-chaos-%,$(wildcard tests/chaos/test_*.py))

# The Python that makes .venv: python3.11 (the tested one), else one that is newer.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && command -v $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint types test-ray test-slow test-chaos $(CHAOS) test-chaos-elsewhere bench clean distclean

help:  ## this list
	@echo "m2mkd_ray: module-to-module knowledge distillation on Ray and DeepSpeed"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with the tested packages (2-3 minutes the first time, 5 GB)

$(INSTALLED): setup.cfg constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(NEW_ENOUGH)' || { \
		echo "m2mkd_ray needs Python 3.11 or newer, but found: $$($(or $(PYTHON),python3) --version 2>&1)." \
		"Install python3.11 with its venv module, or say where it is: make install PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@# deepspeed comes as source and looks for torch and setuptools while it builds: those first, then all
	@# the rest without build isolation. DS_BUILD_OPS=0: its ops compile on first use, not now.
	@echo "Installing into $(VENV) (2-3 minutes the first time): 1/2 torch with its CUDA libraries ..."
	@$(PIP) install -c constraints.txt torch torchvision setuptools wheel
	@echo "Installing into $(VENV): 2/2 ray, deepspeed, timm and the rest ..."
	@DS_BUILD_OPS=0 $(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Installed. The command is $(BIN)/m2mkd"

demo: $(INSTALLED)  ## the whole flow on real images: data to report, on this machine
	$(BIN)/m2mkd run demo --store $(STORE)

test: $(INSTALLED)  ## the default tests (three to four minutes; no Ray, no network)
	$(TEST)

check: lint types test  ## what every commit passes: lint, types, test

lint: $(INSTALLED)  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy over the package
	$(BIN)/mypy

test-ray: $(INSTALLED)  ## tests on a local Ray (eleven minutes)
	$(TEST) -m "ray and not slow and not chaos and not gpu"

test-slow: $(INSTALLED)  ## the longer tests
	$(TEST) -m "slow and not chaos and not gpu"

test-chaos: $(CHAOS) test-chaos-elsewhere  ## tests that kill workers, drivers and nodes in mid-run (twenty minutes, with -j2 ten)

test-chaos-elsewhere: $(INSTALLED)
	$(TEST) -m "chaos and not gpu" --ignore=tests/chaos

$(CHAOS): test-chaos-%: $(INSTALLED)
	$(TEST) -m "chaos and not gpu" tests/chaos/test_$*.py

bench: $(INSTALLED)  ## the measurements of benchmarks/, one after the other
	@set -e; for file in benchmarks/[!_]*.py; do name=$$(basename $$file .py); echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name --json $(STORE)/benchmarks/$$name.json; done

clean:  ## remove caches and build products (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV)
