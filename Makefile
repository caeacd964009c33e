# Only Python 3.11+, git and make are needed; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint unit slow clean

demo: $(INSTALLED)
	$(BIN)/moe-beyond quickstart --out demo

test: lint unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(INSTALLED)
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

slow: $(INSTALLED)
	$(BIN)/pytest -n auto --dist worksteal -m slow

# torch first and alone: where an index offers a CPU build of the pinned release, nothing may pull in another.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv demo
