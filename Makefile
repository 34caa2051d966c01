# make demo | test | lint | bench | clean. Each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-short family examples-short cookbook cookbook-short test lint bench bench-short clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first, by itself: a resolver that meets lpips before it may choose a build of gigabytes.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[digits]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## teacher, student, samples and edits on real images, into demo/; about 10 minutes on 2 cores
	$(BIN)/python examples/demo.py --out demo

demo-short: $(VENV)/.demo  ## the same commands with little training: does everything run?
	$(BIN)/python examples/demo.py --out demo-short --short

family: $(VENV)/.demo  ## every method side by side, into family/; hours on 2 cores
	$(BIN)/python examples/family.py --on mixture --out family
	$(BIN)/python examples/family.py --on digits --out family

examples-short: $(VENV)/.demo demo-short/student/model.safetensors  ## the other examples with little training
	rm -rf family-short inconsistencies-short
	$(BIN)/python examples/family.py --on mixture --short --out family-short
	$(BIN)/python examples/inconsistencies.py --on mixture --short --out inconsistencies-short
	$(BIN)/python examples/composition.py --teacher demo-short/teacher --first demo-short/student --iterations 20 \
		--out family-short/composition.safetensors
	$(BIN)/python examples/cifar_judge.py --data digits --resolution 16 --epochs 1 --limit 256 --out family-short/judge.pt2
	$(BIN)/python examples/strokes.py --model digits-small --data digits:test --features family-short/judge.pt2 -n 8 \
		--out family-short/strokes
	$(BIN)/python examples/edits.py --model digits-small --data digits:test -n 2 --out family-short/edits
	$(BIN)/python examples/box.py --data digits:train --short --out family-short/box

cookbook: $(VENV)/.demo  ## every script of the cookbook on digits, what it prints and makes in cookbook/kept
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/cookbook/all.sh cookbook

cookbook-short: $(VENV)/.demo  ## the same with almost no work
	PATH="$(CURDIR)/$(BIN):$$PATH" SHORT=1 bash examples/cookbook/all.sh cookbook-short

demo-short/student/model.safetensors:
	$(MAKE) demo-short

# In the order of the files: few long tests stand in some, and those must not come last.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev  ## start-up, training and sampling beside plain PyTorch; many minutes on 2 cores
	$(BIN)/python benchmarks/run.py

bench-short: $(VENV)/.dev  ## a little of each: does it run?
	$(BIN)/python benchmarks/run.py --quick

clean:
	rm -rf $(VENV) demo demo-short family family-short inconsistencies inconsistencies-short cookbook cookbook-short build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
