# make demo, make test: each sets up $(VENV) if that is needed, and runs. The plain commands are in README.md.
VENV ?= .venv
PYTHON ?= python3

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: demo test lint aot mutations
demo: $(VENV)/.done
	$(VENV)/bin/python -m lpo_fast.train demo

test: $(VENV)/.done
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --cov=lpo_fast --cov-report=term --cov-fail-under=90

lint: $(VENV)/.done
	$(VENV)/bin/ruff check .

aot: $(VENV)/.done
	$(VENV)/bin/python bench/aot.py

mutations: $(VENV)/.done
	$(VENV)/bin/python tests/mutate.py
