# One virtual environment, .venv, for everything. constraints.txt pins torch, and the harness whose faults are tested:
# give it to every pip call.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test test-all lint format model clean

install: $(VENV)/.installed ## make .venv with crispedit in it

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $$(command -v $(PYTHON) || command -v python3) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) -e '.[test,dev]'
	# the oracle of the curvature tests; --no-deps, or it brings a torchvision that breaks a CPU build of torch
	$(PIP) --no-deps curvlinops-for-pytorch backpack-for-pytorch einconv linear_operator unfoldNd
	touch $@

demo: install ## plain fine-tuning and CrispEdit on the bundled model
	$(BIN)/crispedit demo --json out/demo.json

# two files at a time, a thread each: small tensors gain little from a second thread
test: $(VENV)/.tested ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(VENV)/.tested ## all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.tested ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.tested ## rewrite files as ruff wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

model: install ## train the bundled model anew (about 40 minutes on two cores)
	$(BIN)/python -m crispedit.bundled.train --out src/crispedit/bundled/model

clean:
	rm -rf $(VENV) out dist build
