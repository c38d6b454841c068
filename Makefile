# Each target sets up $(VENV) if that is needed, and runs. The plain commands are in README.md.
VENV ?= .venv
PYTHON ?= python3
BASE ?= HEAD~1
RUN = $(VENV)/bin/python
FAST = tests/test_architecture.py tests/test_cli.py tests/test_words.py tests/data/test_data.py tests/data/test_preferences.py \
	tests/method/test_loss.py tests/method/test_preference.py tests/method/test_schedule.py tests/method/test_select.py \
	tests/models/test_loras.py tests/preflight/test_meta.py tests/robustness/test_mutations.py

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: help demo lint types fast test full bench aot mutations same docs
help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.done ## run both training stages on the embedded world: minutes on a laptop
	$(RUN) -m lpo_fast.train demo

lint: $(VENV)/.done ## check the style of the source
	$(VENV)/bin/ruff check .

types: $(VENV)/.done ## check the types of method/, system/, run/, lpo/, and lrm/
	$(VENV)/bin/basedpyright --pythonpath $(RUN)

fast: lint ## answer within a minute: lint, and the quick tests of data, method, models, and settings
	$(RUN) -m pytest -n 2 --dist worksteal $(FAST)

test: $(VENV)/.done ## run all tests, with coverage, on two cores
	$(RUN) -m pytest -n 2 --dist worksteal --cov=lpo_fast --cov-report=term --cov-fail-under=90

full: test mutations ## also what takes hours: all mutations, kills, long runs, other environments
	$(RUN) tests/tools/kill.py
	$(RUN) tests/tools/endurance.py
	$(RUN) tests/tools/environments.py

bench: $(VENV)/.done ## time every kernel and both loops on this machine, in small sizes without a GPU
	$(RUN) -m pytest bench --benchmark-only

aot: $(VENV)/.done ## compile all kernels ahead of time, which needs no GPU
	$(RUN) bench/tools/aot.py

mutations: $(VENV)/.done ## break the source in small ways and see that a test notices each
	$(RUN) tests/tools/mutate.py

same: $(VENV)/.done ## train with commit BASE and with this tree: are metrics and weights equal in every byte?
	$(RUN) tests/tools/same.py $(BASE)

docs: $(VENV)/.done ## build the documentation into site/
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(VENV)/bin/mkdocs build --strict
