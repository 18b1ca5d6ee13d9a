# make demo   set up everything, then compile a small Llama and a small Wan and show what happened
# make test   set up everything, then format, lint, types and all tests
# make test-npu  the tests on the stand-in NPU alone: the real torch_npu in an environment of its own
# make nightly  the random programs and calls, ten times as many as in the tests
# make bench-npu  Ascend compilers with and without ours, on the stand-in NPU; rewrites its tables of benchmarks/README.md
# make bench  set up everything, then measure all there is and compare with the baselines; rewrites the tables of benchmarks/README.md
# make bench-single  of that, one process against plain Inductor; the tables of a GPU as well where there is one
# make bench-check  what was measured last beside benchmarks/baselines.json; fails where it is worse than the noise
# make plots  the pictures of benchmarks/README.md, from what was measured last
# make bench-sequence  sequence parallelism on 2 and 4 gloo ranks of this machine; rewrites its tables of benchmarks/README.md

PYTHON ?= python3
VENV ?= .venv
NPU_VENV ?= .venv-npu
TORCH ?= torch==2.13.0
TORCH_NPU ?= torch-npu==2.13.0
BIN = $(VENV)/bin
PARTS = compiler passes lowering runtime
TYPED = build/mypy/sgl_npu
JOBS ?= 2
NPU_TESTS = npu-npugraph_ex npu-ge npu-wheel

.PHONY: demo test test-npu nightly bench bench-single bench-npu bench-sequence bench-check plots lint types fast slow clean $(NPU_TESTS)

demo: $(VENV)/ready
	$(BIN)/sgl-npu demo

# Then each kind of test in a process of its own, two at a time: most of them use one core.
test: lint types $(NPU_VENV)/ready
	$(MAKE) --keep-going --jobs=$(JOBS) --output-sync=target fast slow $(NPU_TESTS)

# torch first and alone: asked for by another package it may come in another build.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "Installing torch and the model libraries into $(VENV): 2 GB, a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test,models]"
	touch $@

# torch_npu asks for libraries of an NPU as soon as torch is imported, so it has an environment of its own. It may not
# bring another build of torch along, so what else it needs is named here.
$(NPU_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NPU_VENV)
	$(NPU_VENV)/bin/pip install --quiet --upgrade pip
	$(NPU_VENV)/bin/pip install --quiet "$(TORCH)"
	$(NPU_VENV)/bin/pip install --quiet --no-deps "$(TORCH_NPU)"
	$(NPU_VENV)/bin/pip install --quiet -c constraints.txt numpy pyyaml protobuf -e ".[test,models]"
	touch $@

# Its two graph compilers refuse to share a process.
test-npu: $(NPU_VENV)/ready
	$(MAKE) --jobs=$(JOBS) --output-sync=target $(NPU_TESTS)

$(NPU_TESTS): npu-%: $(NPU_VENV)/ready
	$(NPU_VENV)/bin/python -m pytest tests/ascend/$*

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy reads packages from folders of their name, so it gets a folder of links.
types: $(VENV)/ready
	mkdir -p $(TYPED)
	for part in $(PARTS); do ln -sfn "$(CURDIR)/$$part" $(TYPED)/$$part; done
	ln -sfn "$(CURDIR)/sgl_npu/integrations" $(TYPED)/integrations
	ln -sf "$(CURDIR)/sgl_npu/__init__.py" "$(CURDIR)/sgl_npu/ops.py" $(TYPED)/
	cd build/mypy && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" -p sgl_npu

fast: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow"

slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

bench: bench-single bench-sequence bench-npu
	$(BIN)/python -m benchmarks.check

bench-single: $(VENV)/ready
	$(BIN)/python benchmarks/run.py

bench-npu: $(NPU_VENV)/ready
	$(NPU_VENV)/bin/python -m benchmarks.ascend

bench-sequence: $(VENV)/ready
	$(BIN)/python -m benchmarks.sequence

# What can be counted is counted anew; what is timed is as it was measured last.
bench-check: $(VENV)/ready
	$(BIN)/python benchmarks/run.py npu_graph demo
	$(BIN)/python -m benchmarks.check

plots: $(VENV)/ready
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.plots

clean:
	rm -rf $(VENV) $(NPU_VENV) build dist *.egg-info

nightly: $(VENV)/ready
	SGL_NPU_FUZZ=2000 $(BIN)/python -m pytest -m slow -k random tests/test_match_fuzz.py tests/test_lowering_cpu.py tests/test_lowering_npu.py
