# Two commands set everything up on a machine that has Python >= 3.10 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := rlo-core rlo-timm rlo-hf rlo-gptq rlo-stylegan
PYPROJECTS := pyproject.toml $(PACKAGES:%=packages/%/pyproject.toml)
# numpy, scikit-learn and others have left Python 3.10, so it has a resolution of its own.
CONSTRAINTS := constraints/$(shell $(PYTHON) -c 'import sys; print("dev.txt" if sys.version_info >= (3, 11) else "dev-py310.txt")')
EDITABLE := -e packages/rlo-core[all] -e packages/rlo-timm[all] -e packages/rlo-hf[all] -e packages/rlo-gptq[all] -e packages/rlo-stylegan

.PHONY: help install demo test test-all lint format types pytest public-api lock clean

help:
	@echo "make demo      train, compare and quantize on data that ships with the dependencies"
	@echo "make test      ruff, mypy --strict and the fast tests"
	@echo "make test-all  the slow tests too"

install: $(VENV)/.installed

$(VENV)/.installed: $(PYPROJECTS) $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) --group dev $(EDITABLE)
	@touch $@

demo: install
	$(BIN)/rlo demo

test: lint types pytest

test-all: lint types install
	$(BIN)/python -m pytest -m "not gpu and not upstream"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

pytest: install
	$(BIN)/python -m pytest

# The promised names of each package, as they are now; say what goes in the CHANGELOG.
public-api: install
	$(BIN)/python scripts/public_api.py --write

# Re-resolve the locked versions for both supported resolutions (plain name==version lines, no addresses).
lock: install
	$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV)
