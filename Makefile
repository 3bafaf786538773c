# Two commands set everything up on a machine that has Python >= 3.10 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, a file each; 0 for one that can be debugged.
WORKERS ?= 2
PACKAGES := rlo-core rlo-timm rlo-hf rlo-gptq rlo-stylegan
PYPROJECTS := pyproject.toml $(PACKAGES:%=packages/%/pyproject.toml)
# numpy, scikit-learn and others have left Python 3.10, so it has a resolution of its own.
CONSTRAINTS := constraints/$(shell $(PYTHON) -c 'import sys; print("dev.txt" if sys.version_info >= (3, 11) else "dev-py310.txt")')
EDITABLE := -e packages/rlo-core[all] -e packages/rlo-timm[all] -e packages/rlo-hf[all] -e packages/rlo-gptq[all] -e packages/rlo-stylegan

.PHONY: help install install-hashed audit demo test test-all quick lint format types pytest docs dist public-api lock clean
.PHONY: test-core test-timm test-hf test-gptq test-stylegan

help:
	@echo "make demo      train, compare and quantize on data that ships with the dependencies"
	@echo "make test      ruff, mypy --strict and the fast tests"
	@echo "make quick     lint and the tests of what changed, under a minute"
	@echo "make test-all  the slow tests too"
	@echo "make test-core, test-timm, test-hf, test-gptq, test-stylegan: one package's fast tests"
	@echo "make docs      the documentation, into build/docs; warnings are errors"
	@echo "make dist      the five wheels and their bills of materials in dist/, installed by name and tried"
	@echo "make audit     known vulnerabilities and licences of what is locked"

install: $(VENV)/.installed

$(VENV)/.installed: $(PYPROJECTS) $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) --group dev $(EDITABLE)
	@touch $@

# The same, but no file that is not in the lock: what CI runs on the two Pythons that are locked.
# pip brings its own certificate of every file, and uv is a file of the lock too.
HASHES := $(CONSTRAINTS:.txt=.hashes.txt)
install-hashed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(HASHES)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation $(EDITABLE)
	@touch $(VENV)/.installed $(VENV)/.audit

demo: install
	$(BIN)/rlo demo

test: lint types pytest

test-all: lint types install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu and not upstream"

# Lint, and the tests that go with the files that differ from BASE (its own commits included).
BASE ?= main
quick: lint
	$(BIN)/python scripts/quick.py --base $(BASE)

test-core test-timm test-hf test-gptq test-stylegan: test-%: install
	$(BIN)/python -m pytest tests/$*

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

pytest: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Sphinx, MyST and furo are installed here only; every warning is an error, doctests run.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b doctest docs build/doctest
	@echo "build/docs/index.html"

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) --group docs
	@touch $@

dist: $(VENV)/.audit
	$(BIN)/python scripts/dist.py

# Known vulnerabilities of the locked versions, and the licences of what is installed.
audit: $(VENV)/.audit
	$(BIN)/python scripts/audit.py

$(VENV)/.audit: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) --group audit
	@touch $@

# The promised names of each package, as they are now; say what goes in the CHANGELOG.
public-api: install
	$(BIN)/python scripts/public_api.py --write

# Re-resolve the locked versions for both supported resolutions, and their hashes (no addresses).
lock: install
	$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV)
