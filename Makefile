# The two commands a newcomer needs are `make demo` and `make test`. Each sets up .venv by itself,
# at once when that is done already, and goes on where it was interrupted.
#
#   PYTHON=python3.12              which Python makes the environment (3.11 or newer)
#   TORCH_INDEX_URL=https://...    where torch comes from, e.g. https://download.pytorch.org/whl/cpu
#   DEMO_ARGS="--minutes 1"        options of `mtnlg demo`
#   TEST_ARGS="tests/config -x"    options of pytest

VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
export PYTHON TORCH_INDEX_URL

.PHONY: help demo test lint types format clean

help:  ## show what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: .setup-demo  ## set up, train a small model for three minutes, show what it writes
	@$(VENV)/bin/mtnlg demo $(DEMO_ARGS)

test: .setup-dev  ## set up and run the tests
	@$(VENV)/bin/python -m pytest $(TEST_ARGS)

lint: .setup-dev  ## ruff's checks and formatting
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: .setup-dev  ## mypy
	@$(VENV)/bin/mypy

format: .setup-dev  ## let ruff mend and format
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:  ## remove the environment, the demo's run and all caches
	rm -rf $(VENV) runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

.PHONY: .setup-demo .setup-dev
.setup-demo:
	@sh scripts/setup_environment.sh $(VENV) plot,data

.setup-dev:
	@sh scripts/setup_environment.sh $(VENV) dev
