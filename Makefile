# One-word tasks. `make` alone lists them.

BIN := $(if $(wildcard .venv/bin/python),.venv/bin/,)

.DEFAULT_GOAL := help
.PHONY: help setup run test fast lint types docs check bench clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make .venv and install everything a developer needs (compiles llama.cpp: about 4 minutes)
	python3 -m venv .venv
	.venv/bin/pip install -e '.[dev]'

run:  ## press the starter model
	$(BIN)nightpress run

test:  ## all tests
	$(BIN)pytest -n auto

fast:  ## the tests that take seconds
	$(BIN)pytest -n auto -m 'not slow'

lint:  ## ruff
	$(BIN)ruff check .

types:  ## mypy, strict
	$(BIN)mypy

docs:  ## write docs/cli.md and docs/settings.md from the code
	$(if $(BIN),$(BIN)python,python3) docs/cli_reference.py
	$(if $(BIN),$(BIN)python,python3) docs/settings_reference.py

check: lint types test  ## what CI asks for

bench:  ## every script in benchmarks/
	@for script in benchmarks/*.py; do \
		echo "== $$script"; $(if $(BIN),$(BIN)python,python3) "$$script" || exit 1; \
	done

clean:  ## remove what tools left behind; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
