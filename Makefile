# Every target sets up what it needs: python3 and make are enough to start.
#
# On Linux the default torch wheel brings CUDA. For the much smaller CPU build:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,demo,frameworks
BIN := $(VENV)/bin
READY := $(VENV)/.installed-$(EXTRAS)
READY_DOCS := $(VENV)/.installed-docs
FAST := not slow

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format docs bench bench-all clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamp makes a second call quick; a change of the requirements installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch '$@'

setup: $(READY) ## install the package and its tools into .venv

demo: $(READY) ## run the embedded demo into runs/demo
	$(BIN)/headforcing demo --out runs/demo

test: $(READY) ## the fast tests
	$(BIN)/python -m pytest -q -n auto -m '$(FAST)'

test-all: $(READY) ## every test, the slow ones included
	$(BIN)/python -m pytest -q -n auto

check: $(READY) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict headforcing integrations

format: $(READY) ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The API pages are read from an installed copy: only there is integrations/ in its importable place.
# Both engines read mkdocs.yml. MkDocs is what is published; Zensical, its successor, passes over what it does not know,
# so what they built is checked.
docs: $(READY_DOCS) ## build the documentation into site/, and with Zensical into build/
	rm -rf build site
	$(BIN)/python -m pip install --quiet --no-deps --target build/docs-package .
	$(BIN)/zensical build --strict --clean
	mv site build/site-zensical
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python .ci/check_site.py docs site build/site-zensical

bench: $(READY) ## measure the attention beside the dense one, into runs/bench
	$(BIN)/python benchmarks/attention.py --out runs/bench/attention.json

bench-all: $(READY) ## every benchmark of speed and memory, into runs/bench/report.md
	$(BIN)/python benchmarks/all.py --out runs/bench

clean: ## remove what was built, keep .venv and runs
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
