# make train   set up .venv, prepare the digits, train, evaluate the best checkpoint
# make test    set up what is missing and run the tests        make test-all   the slow ones too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data
CONFIG ?= configs/digits.py
WORKDIR ?= runs/digits

.PHONY: train test test-all lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.runtime
	$(BIN)/python -m polaformer_jax.data.prepare sklearn_digits --data-dir $(DATA)
	$(BIN)/python train.py --config $(CONFIG) --config.data.data_dir=$(DATA) --workdir $(WORKDIR)

test: lint
	$(BIN)/python -m pytest -q -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -q -m "slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BIN)/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(DATA) runs *.egg-info
