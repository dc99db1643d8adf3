# make train       set up .venv, prepare the digits, train, evaluate the best checkpoint
# make segment     the same with a segmenter, on scenes of digits (docs/segmentation.md)
# make test        set up what is missing and run the tests        make test-all   the slow ones
#                  make test ROOM=weights runs those of one package
# make demo        build the page that classifies images in a browser (docs/demo), with the model of make train; needs npm
# make docs        build the documentation site in docs/_build, from the notebooks as they are committed; any warning fails
# make notebooks   build the notebooks of docs/ from their .py files and execute them; a few minutes

PYTHON ?= python3
VENV := .venv
ONNX := .venv-onnx
BIN := $(VENV)/bin
DATA ?= data
CONFIG ?= digits
ROOM ?=
WORKDIR ?= runs/digits
SEGMENT_WORKDIR ?= runs/scenes

.PHONY: train segment test test-all demo docs notebooks lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.runtime
	$(BIN)/polaformer prepare sklearn_digits --data-dir $(DATA)
	$(BIN)/python train.py --config $(CONFIG) --config.data.data_dir=$(DATA) --workdir $(WORKDIR)

segment: $(VENV)/.runtime
	$(BIN)/polaformer prepare digit_scenes --data-dir $(DATA)
	$(BIN)/python train.py --config segmentation:digits --config.data.data_dir=$(DATA) --workdir $(SEGMENT_WORKDIR)

# Tests leave out most of XLA's optimisations, whose time they would spend on programs that run once; those that compare
# full-size models and a training of the official recipe have them (tests/support/quick.py). Three processes share two
# cores in the slow tests, which often wait for processes that they start. Files go to the processes in order, those of the
# longest slow tests first, so that no process is left with one of them at the end.
PYTEST = XLA_FLAGS="$$($(BIN)/python tests/support/quick.py)" $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder
LONG := tests/export/ tests/training/ tests/packaging/
ROOMS := $(sort $(dir $(wildcard tests/*/test_*.py)))

test: lint
	$(PYTEST) -n 2 -m "not slow" $(addprefix tests/,$(ROOM))

test-all: lint $(VENV)/.docs
	$(PYTEST) -n 3 -m slow $(if $(ROOM),$(addprefix tests/,$(ROOM)),$(LONG) $(filter-out $(LONG),$(ROOMS)))

demo: $(VENV)/.runtime $(ONNX)/.ready
	$(BIN)/polaformer export --workdir $(WORKDIR) $(WORKDIR)/demo.safetensors --overwrite
	$(ONNX)/bin/python docs/demo/build.py --source $(WORKDIR)/demo.safetensors --out docs/_build/demo

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo "the site is docs/_build/html/index.html"

notebooks: $(VENV)/.docs
	for name in quickstart fine_tuning; do \
	  $(BIN)/python -m jupytext --quiet --to ipynb --set-kernel python3 --output docs/$$name.ipynb docs/$$name.py && \
	  PYTHONPATH="$(CURDIR)" $(BIN)/python -m nbconvert --log-level ERROR --to notebook --inplace --execute \
	    --ExecutePreprocessor.record_timing=False docs/$$name.ipynb || exit 1; \
	done

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

# What writes ONNX files needs older versions of packages that training takes. The tests make it when they need it.
$(ONNX)/.ready: pyproject.toml
	$(PYTHON) -m venv $(ONNX)
	$(ONNX)/bin/python -m pip install --quiet --editable ".[onnx]" pytest scikit-learn
	@touch $@

clean:
	rm -rf $(VENV) $(ONNX) $(ONNX).lock $(DATA) runs docs/_build *.egg-info
