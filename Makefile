# Only Python 3.11+, git and make are needed; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST := pytest -n auto --dist worksteal

.PHONY: help demo test lint format unit slow min docs bench build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED)  ## record, fit and replay the bundled model, into demo/
	$(BIN)/moe-beyond quickstart --out demo

test: lint unit  ## lint, then unit

lint: $(INSTALLED)  ## check style, types, imports between packages, and known weaknesses
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r moe_beyond
	$(BIN)/python tools/audit.py  # audits nothing without a network

format: $(INSTALLED)  ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: $(INSTALLED)  ## run the fast tests
	$(BIN)/$(PYTEST) -m "not slow"

slow: $(INSTALLED)  ## run the slow tests
	$(BIN)/$(PYTEST) -m slow

min: .venv-min/installed  ## run the fast tests on the lowest versions of all dependencies, in .venv-min
	.venv-min/bin/$(PYTEST) -m "not slow" -W default  # old versions warn about each other

docs: $(INSTALLED)  ## write the API documentation as HTML, into site/
	$(BIN)/python tools/build_docs.py --out site

bench: demo/predictor  ## time the start-up of every command, and the replay of the demo's traces
	$(BIN)/python tools/bench_startup.py
	$(BIN)/python tools/bench_replay.py --data demo/traces --predictor demo/predictor --slots 48

demo/predictor: $(INSTALLED)
	$(BIN)/moe-beyond quickstart --out demo

build: $(INSTALLED)  ## build the wheel and the source distribution, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:  ## remove the environments and everything that the targets write
	rm -rf .venv .venv-min demo dist site

# torch comes first and on its own, so that an index with a CPU build of the pinned release serves that build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

.venv-min/installed: pyproject.toml constraints-min.txt
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/pip install -q -c constraints-min.txt torch==2.13.0
	.venv-min/bin/pip install -q -c constraints-min.txt -e '.[test]'
	touch $@
