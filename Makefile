# `make demo` and `make test` need nothing but Python >= 3.10: they set up .venv inside this folder.
PYTHON ?= python3
OUT ?= runs/demo
# Processes that run tests, each with one thread.
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
INSTALLED := build/installed

.PHONY: help demo demo-forecast test test-all test-installed lint type docs dist bench clean

help:
	@echo 'make demo    train on digits, tune, sample, write $(OUT)/report.html (about two minutes)'
	@echo 'make demo-forecast    train on drifting fields, forecast them as an ensemble, write its page (about four minutes)'
	@echo 'make test    run the tests (about two minutes on two cores; JOBS=8 uses eight)'
	@echo 'make test-all         every test: the slow ones, and those that need other libraries; installs them into .venv'
	@echo 'make test-installed   build a wheel and try it in an empty environment, without and with the extra cli'
	@echo 'make lint    check style, format and spelling'
	@echo 'make type    check types'
	@echo 'make docs    build the documentation site into build/docs'
	@echo 'make dist    build the wheel and the source archive into dist'
	@echo 'make bench   measure speed on this machine; compiled networks at a small size, since compiling takes minutes'
	@echo 'make clean   remove .venv and caches; runs/ stays'

demo: .venv/core
	$(BIN)/edm2 demo --out $(OUT)

demo-forecast: .venv/core
	$(BIN)/edm2 demo --forecast

test: .venv/dev
	$(PYTEST)

test-all: .venv/all
	$(PYTEST) -m '' -rs --durations 20

test-installed: dist
	rm -rf $(INSTALLED)
	$(PYTHON) -m venv $(INSTALLED)
	$(INSTALLED)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt dist/*.whl
	cd $(INSTALLED) && bin/python -W error ../../tests/installed/smoke.py
	$(INSTALLED)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt "$$(echo dist/*.whl)[cli]"
	cd $(INSTALLED) && bin/python -W error ../../tests/installed/smoke.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src docs benchmarks examples *.md

type: .venv/dev
	$(BIN)/mypy

docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo 'build/docs/index.html'

# Left-overs in build/lib would end up in the wheel.
dist: .venv/dev
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --outdir dist . >/dev/null
	@ls -l dist

bench: .venv/core
	$(BIN)/python benchmarks/train_step.py --no-compile
	$(BIN)/python benchmarks/train_step.py --no-bf16 --model-channels 16 --channel-mult 1 --num-blocks 1 --resolution 16 --attention 16
	$(BIN)/python benchmarks/sampling.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache

.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "edm2 needs Python >= 3.10; this is %d.%d: try make PYTHON=python3.12" % v[:2])'
	@echo 'Setting up .venv (PyTorch is large: a few minutes the first time) ...'
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[cli]'
	@touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	@touch $@

.venv/all: .venv/dev
	$(PIP) -e '.[all]'
	@touch $@

.venv/docs: .venv/core
	$(PIP) -e '.[docs]'
	@touch $@
