# make train   set up .venv, prepare the digits, train, evaluate the best checkpoint
# make docs    build docs/quickstart.ipynb from docs/quickstart.py, and run it
# make test    set up what is missing and run the tests        make test-all   the slow ones too
#              make test ROOM=weights runs those of one package

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data
CONFIG ?= digits
ROOM ?=
WORKDIR ?= runs/digits

.PHONY: train test test-all docs lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.runtime
	$(BIN)/polaformer prepare sklearn_digits --data-dir $(DATA)
	$(BIN)/python train.py --config $(CONFIG) --config.data.data_dir=$(DATA) --workdir $(WORKDIR)

# Two processes; and the quick tests leave out most of XLA's optimisations, whose time they would spend on programs that
# run once. The slow ones are compiled as users' programs are.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile $(addprefix tests/,$(ROOM))

test: lint
	XLA_FLAGS="$$($(BIN)/python tests/support/quick.py)" $(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST) -m slow

docs: $(VENV)/.docs
	PYTHONPATH=. $(BIN)/python -m jupytext --quiet --to ipynb --output docs/quickstart.ipynb --set-kernel python3 \
	  --run-path . --execute docs/quickstart.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BIN)/python requirements.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --editable ".[train,test]"
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --editable ".[train,docs]"
	@touch $@

clean:
	rm -rf $(VENV) $(DATA) runs *.egg-info
