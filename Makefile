# make demo   set up everything, then compile a small Llama and a small Wan and show what happened
# make test   set up everything, then format, lint, types and all tests
# make bench  set up everything, then measure against plain Inductor; rewrites the tables of benchmarks/README.md

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
PARTS = compiler passes lowering runtime
TYPED = build/mypy/sgl_npu

.PHONY: demo test bench lint types fast slow clean

demo: $(VENV)/ready
	$(BIN)/sgl-npu demo

test: lint types fast slow

# torch first and alone: asked for by another package it may come in another build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test,models]"
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy reads packages from folders of their name, so it gets a folder of links.
types: $(VENV)/ready
	mkdir -p $(TYPED)
	for part in $(PARTS); do ln -sfn "$(CURDIR)/$$part" $(TYPED)/$$part; done
	ln -sfn "$(CURDIR)/sgl_npu/integrations" $(TYPED)/integrations
	ln -sf "$(CURDIR)/sgl_npu/__init__.py" $(TYPED)/__init__.py
	cd build/mypy && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" -p sgl_npu

fast: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow"

slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/ready
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info
