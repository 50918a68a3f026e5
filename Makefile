# Every target sets up what it requires: python3 and make are enough to start.
#
# On Linux the default torch wheel brings CUDA. For the much smaller CPU build:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,demo,frameworks
BIN := $(VENV)/bin
READY := $(VENV)/.installed-$(EXTRAS)
READY_DOCS := $(VENV)/.installed-docs
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadgroup --durations=10

# Dozens of tests start a process: what Python compiled is kept, and what torch.compile made as well.
unexport PYTHONDONTWRITEBYTECODE
TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export TORCHINDUCTOR_CACHE_DIR

.DEFAULT_GOAL := help
.PHONY: help setup setup-docs demo test test-all mutants check format docs docs-all bench bench-all clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamp makes a second call quick; a change of the requirements installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch '$@'

setup: $(READY) ## install the package and its tools into .venv

setup-docs: $(READY_DOCS) ## install what builds the documentation into .venv

demo: $(READY) ## run the embedded demo into runs/demo
	$(BIN)/headforcing demo --out runs/demo

test: $(READY) ## the fast tests: five to seven minutes on two cores
	$(PYTEST) -m 'not slow'

test-all: $(READY) ## every test, with ten times the examples: hours on two cores
	HYPOTHESIS_PROFILE=nightly $(PYTEST) --timeout 7200

mutants: $(READY) ## whether the tests notice 240 planted bugs, into runs/mutants.json: hours; MUTANTS="--sample 20"
	$(BIN)/python tests/mutants.py $(MUTANTS)

check: $(READY) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict headforcing integrations

format: $(READY) ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The API pages are read from an installed copy: only there is integrations/ in its importable place.
docs: $(READY_DOCS) ## build the documentation into site/
	rm -rf build site
	$(BIN)/python -m pip install --quiet --no-deps --target build/docs-package .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python .ci/check_site.py docs site

# MkDocs is what is published. Zensical, its successor, reads mkdocs.yml too and passes over what it does not know,
# so what it built is checked.
docs-all: docs ## build it with Zensical as well, into build/site-zensical
	mv site build/site-mkdocs
	$(BIN)/zensical build --strict --clean
	mv site build/site-zensical
	mv build/site-mkdocs site
	$(BIN)/python .ci/check_site.py docs build/site-zensical

bench: $(READY) ## measure the attention beside the dense one, into runs/bench
	$(BIN)/python benchmarks/attention.py --out runs/bench/attention.json

bench-all: $(READY) ## every benchmark of speed and memory, into runs/bench/report.md
	$(BIN)/python benchmarks/all.py --out runs/bench

clean: ## remove what was built, keep .venv and runs
	rm -rf .cache build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
