# make setup   an environment in .venv            make demo    train and evaluate on digits, at most 10 minutes
# make test    the whole test suite               make lint    ruff and pyright
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup setup-dev test lint clean digits-orders

setup: $(VENV)/.run-installed
setup-dev: $(VENV)/.dev-installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-installed: requirements.txt | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: requirements-dev.txt $(VENV)/.run-installed
	$(PIP) -r requirements-dev.txt
	@touch $@

test: setup-dev
	$(BIN)/python -m pytest -n 2

# An experiment of about an hour on two cores, which resumes; writes docs/results/digits.md
digits-orders: setup
	$(BIN)/python -m benchmarks.digits_orders

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
