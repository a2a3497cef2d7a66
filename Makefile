# Needs nothing but make and Python 3.11 with venv. `make` alone lists what there is.

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
JOBS ?= 3

BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
ROOT := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# what is imported is compiled once: a machine that says otherwise doubles the start of each of a few hundred processes
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup setup-system run test test-fast check format format-check lint types imports bench soak docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[36m%-14s\033[0m %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make the virtual environment from the hashed lock, and install the pre-commit hooks

# --no-deps: the lock is complete, and pip need not resolve it again; --no-compile: Python compiles what it imports, a part of it all
$(STAMP): requirements.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "Python 3.11 is needed. Install it, or say where it is: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@"$(BIN)/python" -c 'import pip' 2>/dev/null || { echo "creating $(VENV)"; "$(PYTHON)" -m venv --clear "$(VENV)"; } \
	  || { echo "Python's venv is missing. On Debian: apt install python3.11-venv"; exit 1; }
	@echo "installing $$(grep -c '^[a-z0-9.-]*==' requirements.txt) packages from requirements.txt, each checked against its hash"
	@"$(BIN)/python" -m pip install --require-hashes --no-deps --no-compile --requirement requirements.txt
	@"$(BIN)/python" .ci/link_project.py "$(ROOT)"
	@if [ -e .git ] && [ -z "$$CI" ] && command -v git >/dev/null; then "$(BIN)/pre-commit" install \
	  || echo "the pre-commit hooks were not installed; everything else is ready"; fi
	@touch $@

# postfix: its own configuration is not used, and no service is started; chromium: the tests of pages
setup-system: ## install what tests need from Debian: Postfix and Chromium, where they are missing (as root)
	@missing=""; \
	  test -x /usr/sbin/postfix || missing="$$missing postfix"; \
	  command -v chromium >/dev/null || missing="$$missing chromium"; \
	  test -z "$$missing" || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }

run: setup ## run the whole system here and play sample payments; Ctrl-C stops it (ARGS=--once: stop when they are delivered)
	@exec "$(BIN)/notify" up --data-dir data $(ARGS)

# each of JOBS processes has servers of its own, a file's tests share theirs; -n0 in ARGS: one process, as -s needs it
test: setup ## run every test, with the real servers they start themselves (ARGS='-k trail' for some)
	@"$(BIN)/python" -m pytest -m "not soak" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: setup ## run unit and contract tests only: seconds
	@"$(BIN)/python" -m pytest -m "not soak" tests/unit tests/contract $(ARGS)

check: format-check lint types imports test ## do exactly what CI does

format: setup ## format the code, and fix what can be fixed
	@"$(BIN)/ruff" format .
	@"$(BIN)/ruff" check --fix .

format-check: setup ## is everything formatted?
	@"$(BIN)/ruff" format --check .

lint: setup ## ruff, spelling, and the syntax of every file
	@"$(BIN)/ruff" check .
	@"$(BIN)/codespell" $$("$(BIN)/python" .ci/check_files.py --list)
	@"$(BIN)/python" .ci/check_files.py

types: setup ## mypy --strict, tests included
	@"$(BIN)/mypy"

imports: setup ## do imports point one way?
	@"$(BIN)/lint-imports"

bench: setup ## measure every figure of docs/performance.md, each beside its peers
	@"$(BIN)/python" -m benchmarks $(ARGS)

soak: setup ## run the long tests
	@"$(BIN)/python" -m pytest -m soak $(ARGS)

docs: setup ## write the picture and the tables that follow from the code
	@"$(BIN)/python" -m streams.documents $(ARGS)

# packages younger than three weeks are left out: mirrors have them late, and bad releases are found by then
lock: setup ## write requirements.txt anew from pyproject.toml (ARGS=--upgrade: the newest versions)
	@test -x .cache/uv/bin/uv || { "$(PYTHON)" -m venv .cache/uv && .cache/uv/bin/python -m pip install --quiet uv; }
	@.cache/uv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --extra embedded --extra msk --group dev --exclude-newer "$$("$(PYTHON)" -c 'import datetime as d; print(d.date.today() - d.timedelta(weeks=3))')" \
	  $(ARGS) pyproject.toml --output-file requirements.txt --quiet
	@! grep -n '://' requirements.txt || { echo "requirements.txt names hosts"; exit 1; }

clean: ## remove the environment and caches; ./data, what `make run` stores, stays
	@rm -rf "$(VENV)" .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
