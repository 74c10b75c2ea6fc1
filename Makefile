# Every target makes its own virtual environment inside the clone and uses it again when it is there.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test lint docs downstream bench clean

demo: $(VENV)/.installed
	$(RUN)/velatura run recipes/tinyworld.yaml --processes 2

# Three workers on two cores: while one waits for a timeout or a server, two others compute.
test: $(VENV)/.installed-dev
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 3 --dist loadfile unit_tests integration_tests

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports --no-cache

docs: $(VENV)/.installed-dev
	$(RUN)/python docs/generate_all.py
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

downstream: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest integration_tests/test_downstream.py

bench: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN)/python benchmarks/rl_step.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(RUN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	$(RUN)/python -m pip install --quiet --editable '.[dev]'
	$(RUN)/python -m pip install --quiet --no-deps brisque==0.2.0
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
