# make demo    fine-tune the embedded model on a CPU and show that it got better
# make test    run the tests
# make check   lint, formatting, types
# make attack  damage inputs, kill runs, attack pages and servers; TIME
# make attack-short   a part of it with a seed of the commit; two minutes
#
# Each installs what it needs into .venv first. Other Python: make demo PYTHON=python3.12
# pip picks the torch build. On Linux without a GPU the CPU build is many times smaller; give pip the index that
# pytorch.org names for it: make demo PIP_FLAGS="--extra-index-url URL"

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS)

.PHONY: demo test check attack attack-short format clean

demo: .venv/installed
	$(BIN)/medvqa-rl demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

attack: .venv/installed-dev
	$(BIN)/python -m dev.attacks

attack-short: .venv/installed-dev
	$(BIN)/python -m dev.attacks --short --jobs 2

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(PIP) -e .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(PIP) -e '.[dev]'
	touch $@ .venv/installed
