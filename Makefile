# Two commands on a fresh machine: `make demo` and `make test`. Both set themselves up, in .venv.
#
#   demo         trains, samples and evaluates on embedded real data, in runs/demo
#   test         lint, types and tests: what a change must pass
#   test-oldest  the tests on Python 3.11, in .venv-3.11
#   laws         the tests marked slow as well: heavier evidence for what the README promises
#   matrix       every generator on the tokens of every tokenizer, some minutes
#   survival     sixty kills of three runs, against undisturbed ones; flipped bits, full disks
#   bench        ratio tables into docs/results; PEER=/path/python adds the named peers beside ours
#   notebooks    executes every notebook
#   clean        removes caches and build products; .venv and runs stay
#
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of the list below that runs,
# is 3.11 or newer, and has venv and ensurepip (a pyenv shim or a system Python may lack either).

SHELL := /bin/bash
.DEFAULT_GOAL := test
.PHONY: demo test test-oldest lint types laws matrix survival bench notebooks clean

BIN := .venv/bin
comma := ,
PYENV := $(HOME)/.pyenv/versions
NEWEST := python3.12 python3.13 python3.11 python3.14 python3.15 python3 python \
  $(wildcard $(PYENV)/3.12*/bin/python $(PYENV)/3.13*/bin/python $(PYENV)/3.1[14-9]*/bin/python)
OLDEST := python3.11 python3 $(wildcard $(PYENV)/3.11*/bin/python)
FOLDERS := networks tokenizers generators data evaluation launch configs
SOURCES := pyproject.toml setup.py constraints.txt
# Two processes with whole files each: what a file builds once it builds once.
SIDE_BY_SIDE := --numprocesses=2 --dist=loadfile

# $(call environment,FOLDER,CANDIDATES,TEST): a virtual environment in FOLDER, unless a working one
# is there, from the first candidate for which the Python expression TEST holds.
define environment
@if ! $(1)/bin/python -c 'import pip, sys; sys.exit(not ($(3)))' >/dev/null 2>&1; then \
  for python in $(PYTHON) $(2) none; do \
    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not ($(3)))' >/dev/null 2>&1; \
    then break; fi; \
  done; \
  if [ "$$python" = none ]; then \
    echo 'No interpreter found with $(3), venv and ensurepip; install one (Debian: python3-venv),' \
      'or name it: make PYTHON=/path/to/python' >&2; exit 2; \
  fi; \
  echo "$(1): $$("$$python" --version) ($$python)"; \
  "$$python" -m venv --clear $(1); \
fi
endef

demo: .venv/installed
	$(BIN)/smalti demo --workdir=runs/demo

test: lint types
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

lint: .venv/installed-test
	$(BIN)/ruff check .

# The installed package is an import hook, which mypy does not follow: a link named smalti is enough.
types: .venv/installed-test
	@mkdir -p .venv/types && ln -sfn ../.. .venv/types/smalti
	cd .venv/types && MYPYPATH="$$PWD" ../bin/mypy --config-file=../../pyproject.toml \
	  --cache-dir=../../.mypy_cache $(FOLDERS:%=-p smalti.%)

test-oldest: .venv-3.11/installed-test
	.venv-3.11/bin/python -m pytest $(SIDE_BY_SIDE)

laws: .venv/installed-test
	$(BIN)/python -m pytest -m 'slow or not slow'

matrix: .venv/installed-test
	$(BIN)/python -m pytest -m 'slow or not slow' $(SIDE_BY_SIDE) tests/launch/test_matrix.py

survival: .venv/installed-test
	$(BIN)/python tests/survival.py

bench: .venv/installed
	$(BIN)/smalti bench --out=docs/results $(if $(PEER),--peer_python=$(PEER))

notebooks: .venv/installed-test
	$(BIN)/python -m pytest -m 'slow or not slow' tests/notebooks

clean:
	rm -rf build dist smalti.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name .venv\* -prune -o -name runs -prune -o -name __pycache__ -type d -print \
	  | xargs rm -rf

.venv/installed: $(SOURCES)
	$(call environment,.venv,$(NEWEST),sys.version_info >= (3$(comma) 11))
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	@touch $@

.venv/installed-test: $(SOURCES)
	$(call environment,.venv,$(NEWEST),sys.version_info >= (3$(comma) 11))
	$(BIN)/python -m pip install --quiet -e '.[test,neighbours]' -c constraints.txt
	@touch .venv/installed $@

.venv-3.11/installed-test: $(SOURCES)
	$(call environment,.venv-3.11,$(OLDEST),sys.version_info[:2] == (3$(comma) 11))
	.venv-3.11/bin/python -m pip install --quiet -e '.[test,neighbours]' -c constraints.txt
	@touch $@
